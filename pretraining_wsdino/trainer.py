"""The training loop: given an objective and its data, it takes steps, logs, saves, resumes, and stops between steps.

Everything a step draws (pairs, crop boxes, drop path) is keyed by the seed and the global step, and every schedule is
a function of the step. A checkpoint is therefore the networks, the optimiser, the centre and one number, and a resumed
run continues exactly where it stopped (on a GPU up to what the backward of attention leaves undetermined).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from torch import nn
from torch.utils.data import DataLoader

from wsdino.errors import UserError
from wsdino.launch import Interruption, on_main_process
from wsdino.loader import batches, check_shared_memory, ignore_first_signal, processes_here, worker_count
from wsdino.run_folder import RunFolder

from .checkpoints import Checkpoints
from .metrics_log import MetricsLog
from .pairs import PairBatchSampler
from .schedules import cosine_schedule
from .settings import LoopSettings
from .step_data import StepData

Monitors = dict[str, torch.Tensor]  # 0-dimensional and detached, on the training device


class Progress(NamedTuple):
    """Where in the run a step is; every schedule is a function of this."""

    step: int
    steps_per_epoch: int
    total_steps: int

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return self.step // self.steps_per_epoch


class Objective(Protocol):
    """What a `Trainer` trains.

    Attributes
    ----------
    network : torch.nn.Module
        Everything that the optimiser moves; its `backbone` becomes the model. The trainer prepares it.
    """

    network: Any

    def prepare(self, accelerator: Accelerator, network: nn.Module) -> None:
        """Move what stands beside the prepared network (a teacher, a centre) to the device and into checkpoints."""

    def loss(self, network: nn.Module, batch: dict[str, Any], progress: Progress) -> tuple[torch.Tensor, Monitors]:
        """Loss of a micro-batch by the prepared network, and monitors, one of which is called `loss`."""
        ...

    def before_update(self, progress: Progress) -> None:
        """Change gradients, before they are clipped."""

    def after_update(self, progress: Progress) -> None:
        """Follow the moved network."""

    def model(self) -> nn.Module:
        """The backbone that is scored and saved."""
        return self.network.backbone

    def logged(self, progress: Progress, means: dict[str, float]) -> dict[str, Any]:
        """What a line of metrics.jsonl says beside the means of the monitors; `collapse` holds a verdict."""
        return {}


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """AdamW's groups as in DINO: weight decay on matrices, none on biases, norms and other vectors."""
    decayed = [p for p in network.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in network.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": decayed, "decayed": True}, {"params": plain, "decayed": False, "weight_decay": 0.0}]


def step_seed(seed: int, step: int, process: int) -> int:
    """Seed of everything that torch draws in one step of one process."""
    return int(np.random.SeedSequence([seed, step, process]).generate_state(1)[0])


class Trainer:
    """One channel's training, to the end or to an interruption.

    Parameters
    ----------
    settings : LoopSettings
    objective : Objective
    data : StepData
    channel : str
        Names the channel's folder in the run and what is said of it.
    accelerator : Accelerator
        See `new_accelerator`.
    save_model : callable
        `(folder, backbone)`: writes a model repository.
    score : callable, optional
        Scores of a backbone every `eval_every` epochs, numbers by name; all processes call it.
    eval_every : int
        Epochs; 0 is never.
    """

    def __init__(
        self,
        settings: LoopSettings,
        objective: Objective,
        data: StepData,
        channel: str,
        accelerator: Accelerator,
        save_model: Callable[[Path, nn.Module], None],
        *,
        score: Callable[[nn.Module], dict[str, Any]] | None = None,
        eval_every: int = 0,
    ):
        s = settings
        self.settings, self.objective, self.data, self.channel = s, objective, data, channel
        self.accelerator, self.save_model = accelerator, save_model
        self.score, self.eval_every = score, eval_every
        self.run = RunFolder(s.output_dir)
        self.global_batch = s.per_device_train_batch_size * s.gradient_accumulation_steps * accelerator.num_processes
        self.steps_per_epoch = max(len(data.pairs.rows) // self.global_batch, 1)
        self.total_steps = s.num_train_steps or s.num_train_epochs * self.steps_per_epoch
        stops = [self.total_steps, s.max_steps, s.stop_after_epoch and s.stop_after_epoch * self.steps_per_epoch]
        self.last_step = min(stop for stop in stops if stop is not None)
        self.log = MetricsLog(self.run.metrics_file(channel), accelerator)
        self.checkpoints = Checkpoints(self.run, channel, accelerator, s.save_total_limit, self.global_batch)
        self.workers = worker_count(s.dataloader_num_workers, accelerator.device)
        if self.workers:
            self._check_shared_memory()
        optimizer = torch.optim.AdamW(parameter_groups(objective.network), lr=s.learning_rate, fused=True)
        self.network, self.optimizer = accelerator.prepare(objective.network.train(), optimizer)
        objective.prepare(accelerator, self.network)
        self._verdict = None

    def train(self) -> bool:
        """Train to the last step and save the model. False when interrupted.

        Raises
        ------
        UserError
            The loss is not finite, or a checkpoint cannot be read or written.
        """
        s, accelerator = self.settings, self.accelerator
        first_step = self.checkpoints.restore() if s.resume else 0
        if first_step >= self.last_step and self.run.model(self.channel).exists():
            accelerator.print(f"{self.channel}: already trained to step {first_step}.")
            return True
        self.log.open(first_step)
        if s.report_to:
            plain = {k: v for k, v in asdict(s).items() if isinstance(v, int | float | str | bool)}
            accelerator.init_trackers("wsdino", config={**plain, "channel": self.channel})
        title = f"train {self.channel}"
        with (
            Interruption() as interruption,
            tqdm(total=self.last_step, initial=first_step, desc=title, unit="step") as bar,
        ):
            finished = self._loop(first_step, interruption, bar)
        if finished:
            self._save_model(self.run.model(self.channel))
            for tracker in accelerator.trackers:  # end_training would also end the process group, which others need
                tracker.finish()
        else:
            accelerator.print(f"\n{self.channel}: stopped; --resume continues from {self.checkpoints.newest}.")
        return finished

    def save_initial(self) -> None:
        """Save what training starts from, where the seed alone does not give it and no step was taken yet."""
        if not self.run.checkpoints(self.channel):
            self._save_model(self.run.initial_model(self.channel))

    def _loop(self, first_step: int, interruption: Interruption, bar: Any) -> bool:
        """Steps from `first_step` to the last; False when a process was asked to stop."""
        s = self.settings
        steps = self._batches(first_step)
        micro_batches = next(steps, [])
        window, since, line, unread = [], time.perf_counter(), {}, []
        for step in range(first_step, self.last_step):
            monitors = self.step(step, micro_batches)
            fallbacks = micro_batches[0]["fallbacks"]
            micro_batches = next(steps, [])  # cut while the device works
            window.append((monitors, fallbacks))
            unread.append((step, self._told(monitors["loss"], interruption)))
            bar.update()
            epochs_done, rest = divmod(step + 1, self.steps_per_epoch)
            at_end = step + 1 == self.last_step
            due = at_end or (rest == 0 and epochs_done % s.save_every_epochs == 0)
            # The last step's answer is read a step late, so that the host need not wait for the device; a checkpoint
            # waits for its own step's.
            stopped = any([self._heard(*unread.pop(0)) for _ in range(len(unread) - (0 if due else 1))])
            if stopped and unread:
                self._heard(*unread.pop(0))
            if (step + 1) % s.logging_steps == 0 or at_end or stopped:
                line = self._log(step, window, time.perf_counter() - since)
                bar.set_postfix(loss=f"{line['loss']:.3f}", pairs_s=f"{line['pairs_per_second']:.1f}")
                window, since = [], time.perf_counter()
            if self.score and self.eval_every and rest == 0 and epochs_done % self.eval_every == 0:
                self._evaluate(self.score, step, bar)
                since = time.perf_counter()
            if stopped or due:
                self.checkpoints.save(step + 1)
                if epochs_done >= s.warmup_epochs:
                    self._tell_verdict(line, bar)
            if stopped and not at_end:
                return False
        return True

    def _sampler(self, first_step: int) -> PairBatchSampler:
        """Pairs of this process's micro-batches of every step from `first_step` on."""
        s, accelerator = self.settings, self.accelerator
        return PairBatchSampler(
            self.data.pairs,
            batch_size=s.per_device_train_batch_size,
            total_steps=self.last_step,
            first_step=first_step,
            accumulation=s.gradient_accumulation_steps,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )

    def _check_shared_memory(self) -> None:
        """Refuse loader processes whose batches the machine's shared memory does not hold."""
        trial = [self.data.images[pair] for pair in next(iter(self._sampler(0)))]
        check_shared_memory(self.data.collate(trial), self.workers, processes_here(), "dataloader_num_workers")

    def _batches(self, first_step: int) -> Iterator[list[dict[str, Any]]]:
        """Micro-batches of this process for every step from `first_step` on."""
        s = self.settings
        loader = DataLoader(
            self.data.images,
            batch_sampler=self._sampler(first_step),
            collate_fn=self.data.collate,
            num_workers=self.workers,
            worker_init_fn=ignore_first_signal,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator().manual_seed(s.seed),  # leaves the global generator untouched
        )
        micro_batches = batches(loader, "dataloader_num_workers")
        for _ in range(first_step, self.last_step):
            yield [next(micro_batches) for _ in range(s.gradient_accumulation_steps)]

    def progress(self, step: int) -> Progress:
        """Where in the run a step is."""
        return Progress(step, self.steps_per_epoch, self.total_steps)

    def schedules(self, step: int) -> dict[str, float]:
        """Learning rate and weight decay of a step."""
        s, total = self.settings, self.total_steps
        warmup = s.warmup_epochs * self.steps_per_epoch if s.warmup_steps is None else s.warmup_steps
        return {
            "lr": cosine_schedule(
                step,
                start=s.learning_rate,
                end=s.final_learning_rate,
                total_steps=total,
                warmup_steps=min(warmup, total),
            ),
            "weight_decay": cosine_schedule(step, start=s.weight_decay, end=s.final_weight_decay, total_steps=total),
        }

    def step(self, step: int, micro_batches: list[dict[str, Any]]) -> Monitors:
        """One optimiser step; returns the means of the objective's monitors over this process's micro-batches."""
        s, accelerator, progress = self.settings, self.accelerator, self.progress(step)
        now = self.schedules(step)
        for group in self.optimizer.param_groups:
            group["lr"] = now["lr"]
            group["weight_decay"] = now["weight_decay"] if group["decayed"] else 0.0
        set_seed(step_seed(s.seed, step, accelerator.process_index))
        collected = []
        for number, batch in enumerate(micro_batches):
            last = number + 1 == len(micro_batches)
            with nullcontext() if last else accelerator.no_sync(self.network):
                loss, monitors = self.objective.loss(self.network, batch, progress)
                accelerator.backward(loss / len(micro_batches))
            collected.append(monitors)
        self.objective.before_update(progress)
        if s.max_grad_norm > 0:
            accelerator.clip_grad_norm_(self.network.parameters(), s.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.after_update(progress)
        return {name: torch.stack([one[name] for one in collected]).mean() for name in collected[0]}

    def _told(self, loss: torch.Tensor, interruption: Interruption) -> torch.Tensor:
        """Sums over the processes, on the device: the loss, and how many were asked to stop."""
        asked = torch.full_like(loss, float(interruption.signal is not None), dtype=torch.float32)
        return self.accelerator.reduce(torch.stack([loss.float(), asked]), reduction="sum")

    def _heard(self, step: int, told: torch.Tensor) -> bool:
        """Whether any process was asked to stop by the end of `step`; all learn it at once, and of a bad loss too."""
        total, stopped = told.tolist()
        if not np.isfinite(total):
            anchors, partners, _ = self.data.pairs.draw(step, self.global_batch)
            raise UserError(
                f"{self.channel}: the loss of step {step + 1} is not finite; its images are rows "
                f"{sorted({*anchors.tolist(), *partners.tolist()})}; the last good checkpoint is "
                f"{self.checkpoints.newest}. Lower --learning_rate, set --max_grad_norm 1, or check the images."
            )
        return stopped > 0

    def _log(self, step: int, window: list[tuple[Monitors, dict[str, int]]], seconds: float) -> dict[str, Any]:
        """One line of metrics.jsonl: means over the steps since the last line and over the processes."""
        names = list(window[0][0])
        own = torch.stack([torch.stack([one[name].float() for name in names]) for one, _ in window]).mean(0)
        means = dict(zip(names, self.accelerator.reduce(own, reduction="mean").tolist(), strict=True))
        fallbacks: dict[str, int] = {}
        for _, counts in window:
            for level, count in counts.items():
                fallbacks[level] = fallbacks.get(level, 0) + count
        line = {
            "step": step + 1,
            "epoch": (step + 1) / self.steps_per_epoch,
            **self.schedules(step),
            **means,
            **self.objective.logged(self.progress(step), means),
            "pairs_per_second": len(window) * self.global_batch / seconds,
            "partner_fallbacks": fallbacks,
        }
        self.log.append(line)
        return line

    def _evaluate(self, score: Callable[[nn.Module], dict[str, Any]], step: int, bar: Any) -> None:
        """Score the model, for which all processes share the work, into a line of metrics.jsonl."""
        model = self.objective.model()
        training = model.training
        scores = score(model)
        model.train(training)
        if self.accelerator.is_main_process:
            line = {"step": step + 1, "epoch": (step + 1) / self.steps_per_epoch, **scores}
            self.log.append(line)
            found = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
            bar.write(f"{self.channel}, epoch {line['epoch']:g}: {found}")

    def _tell_verdict(self, line: dict[str, Any], bar: Any) -> None:
        """Warn when the teacher starts to look collapsed, and again when it recovers."""
        found = line.get("collapse", {"verdict": "healthy"})
        collapsed = found["verdict"] == "collapsed"
        if collapsed != (self._verdict == "collapsed") and self.accelerator.is_main_process:
            what = f"collapsed: {'; '.join(found['reasons'])}" if collapsed else "no longer collapsed"
            bar.write(f"{self.channel}, step {line['step']}: {what}")
        self._verdict = found["verdict"]

    def _save_model(self, folder: Path) -> None:
        on_main_process(self.accelerator, lambda: self.save_model(folder, self.objective.model()))
