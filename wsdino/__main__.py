"""`python -m wsdino train ...` equals `wsdino-train ...`; with a wheel: `accelerate launch -m wsdino train ...`."""

import sys
from importlib import import_module

# Modules are named rather than imported: a command loads no other one, and the ground floor imports no room.
COMMANDS = {
    "pretrain": "pretrain_simulated",
    "train": "train_accelerate",
    "extract": "extract_profiles",
    "evaluate": "evaluation_wsdino.evaluate_profiles",
    "compare": "evaluation_wsdino.compare",
    "report": "evaluation_wsdino.report",
    "push": "push_to_hub",
    "prepare": "dataset_scripts.prepare",
    "simulate": "dataset_scripts.simulator.simulate",
    "convert": "modeling_wsdino.convert_checkpoint",
}


def main(argv: list[str] | None = None) -> None:
    """Run the command that the first argument names with the other arguments; exit status 2 for an unknown one."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        asked = argv[0] if argv else ""
        usage = f"usage: python -m wsdino {{{','.join(COMMANDS)}}} ...\n"
        if asked in ("-h", "--help"):
            print(usage, end="")
            return
        sys.stderr.write(usage + (f"python -m wsdino: error: there is no command {asked!r}.\n" if asked else ""))
        sys.exit(2)
    import_module(COMMANDS[argv[0]]).main(argv[1:])


if __name__ == "__main__":
    main()
