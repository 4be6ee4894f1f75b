"""The networks of a training run by their profile sets, and any other network by its channels."""

from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from wsdino.errors import UserError, first_line
from wsdino.run_folder import RunFolder

from .configuration_wsdino import WSDinoConfig
from .convert_checkpoint import load_backbone, load_image_processor
from .image_processing_wsdino import WSDinoImageProcessor
from .modeling_wsdino import WSDinoModel, WSDinoMultiChannelModel

TEACHER_FILE = "model_1.safetensors"  # in a checkpoint: training prepares the teacher second


class RunNetworks:
    """Networks of a training run, one per channel, loaded when they are asked for.

    Parameters
    ----------
    run : RunFolder
    channels : list of str
        Trained channels of the run.

    Attributes
    ----------
    processors : dict
        The image processor of each channel, which all its networks share.

    Raises
    ------
    UserError
        From every member: files of a network are absent or damaged; the message names them.
    """

    def __init__(self, run: RunFolder, channels: list[str]):
        self.run, self.channels, self.arguments = run, channels, run.settings()["arguments"]
        self.processors: dict[str, WSDinoImageProcessor] = {
            channel: load_image_processor(run.model(channel)) for channel in channels
        }

    @cached_property
    def trained(self) -> dict[str, WSDinoModel]:
        """The trained teachers."""
        return {channel: load_backbone(self.run.model(channel)) for channel in self.channels}

    def initial(self) -> dict[str, WSDinoModel]:
        """What training started from; empty for random weights as of `untrained`."""
        init, whitened = self.arguments["init"], self.arguments["whiten_patches"]
        if init == "random" and not whitened:
            return {}
        sources = {
            channel: self.run.initial_model(channel) if whitened else init.replace("{channel}", channel)
            for channel in self.channels
        }
        return {name: load_backbone(source, channel_names=[name]) for name, source in sources.items()}

    def untrained(self) -> dict[str, WSDinoModel]:
        """Random weights in the same shape, by the run's seed."""
        models = {}
        for channel in self.channels:
            torch.manual_seed(self.arguments["seed"])
            models[channel] = WSDinoModel(self.trained[channel].config)
        return models

    def steps(self) -> list[int]:
        """The steps of which every channel keeps a checkpoint, in order."""
        kept = [{path.name for path in self.run.checkpoints(channel)} for channel in self.channels]
        return sorted(int(name.removeprefix("step_")) for name in set.intersection(*kept))

    def at_step(self, step: int) -> dict[str, WSDinoModel]:
        """The teachers of one training checkpoint."""
        models = self.untrained()
        for channel, model in models.items():
            path = self.run.checkpoint(channel, step) / TEACHER_FILE
            if self.arguments.get("objective") == "supervised":  # which has no teacher
                path = path.with_name("model.safetensors")
            try:
                state = {name.removeprefix("backbone."): tensor for name, tensor in load_file(path).items()}
                wanted = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
                model.load_state_dict(wanted)
            except (OSError, SafetensorError, RuntimeError) as error:
                raise UserError(f"{path} cannot be loaded ({first_line(error)}): remove that checkpoint.") from error
        return models


def load_towers(
    source: str | Path, channels: list[str] | None = None
) -> tuple[dict[str, WSDinoModel], WSDinoImageProcessor]:
    """One network per channel of a repository, checkpoint or ViT, and its image processor.

    Parameters
    ----------
    source : str or Path
        See `load_backbone`.
    channels : list of str, optional
        Which channels; all of the network if not given. A network that names no channel, as one of ImageNet, takes
        each of these.

    Raises
    ------
    UserError
        There is no such network, or it is not one of these channels.
    """
    model = load_backbone(source)
    known = list(model.config.channel_names)
    if not known and not channels:
        raise UserError(f"The model {source} names no channel: say with --channels which it is to see.")
    channels = choose_channels(channels, known or channels, f"the model {source}")
    towers = {channel: model for channel in channels}
    if isinstance(model, WSDinoMultiChannelModel):
        towers = {channel: model.towers[channel] for channel in channels}
        for channel, tower in towers.items():  # of one channel, whose features the pipeline leaves as they are
            tower.config = WSDinoConfig.from_dict(model.config.to_dict() | {"channel_names": [channel]})
    return towers, load_image_processor(source, model)


def choose_channels(asked: list[str] | None, known: list[str], owner: str) -> list[str]:
    """The asked channels, all of which must be known; all known where none are asked."""
    for name in asked or []:
        if name not in known:
            raise UserError(f"--channels {name}: {owner} has {', '.join(known)}.")
    return asked or known
