"""The training loop.

Each optimizer step takes its batches from the task by number and processes them in parts of `horizon`
segments (truncated backpropagation: gradients flow through the memory inside a part, only values pass to
the next part). Then it clips gradients and updates the weights. A checkpoint holds weights, optimizer,
schedule, random generators and memory state; the data position is the step number. So a resumed run
repeats an uninterrupted one bit for bit.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from memlib.config import (
    Config,
    ConfigError,
    ParallelConfig,
    TaskConfig,
    load_config,
    override,
    save_config,
    to_dict,
)
from memlib.evaluation import Score, evaluate
from memlib.models import MemoryState, MemoryTransformer
from memlib.models.info import count_parameters, format_params
from memlib.models.stores import attached_stores
from memlib.nn.noise import Noise
from memlib.tasks import Batch, Task, make_task
from memlib.training.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    random_state,
    restore_random_state,
    save_checkpoint,
    set_seed,
)
from memlib.training.divergence import TrainingDiverged, check_finite
from memlib.training.log import RunLog
from memlib.training.monitor import Monitor, environment
from memlib.training.optimizer import make_optimizer, make_schedule
from memlib.training.parallel.apply import distribute, loss_of
from memlib.training.parallel.checkpoint import Saver, collect
from memlib.training.parallel.gradients import clip, fill_missing
from memlib.training.parallel.pipeline import Pipeline
from memlib.training.parallel.precision import LossScale
from memlib.training.parallel.ranks import join
from memlib.training.resume import checkpoint_to_resume, progress_of, refill, resume_checkpoint
from memlib.training.stopping import StopSignals, TrainingStopped

__all__ = ["Trainer", "TrainingDiverged", "TrainingStopped", "consolidate", "load_model", "load_run"]


class Trainer:
    """Train the model of a configuration; with a folder, also log, save and resume.

    >>> trainer = Trainer(load_config("recall_internal"))
    >>> trainer.train()
    >>> trainer.evaluate().accuracy

    Raises ConfigError if the task does not fit the model or a pretrained base is named, and FileExistsError
    if the folder already holds a run and resume is false.
    """

    def __init__(
        self, config: Config, folder: str | os.PathLike[str] | None = None, resume: bool = False
    ) -> None:
        if config.adapter.base_model_name is not None:
            raise ConfigError(
                f"adapter.base_model_name = {config.adapter.base_model_name!r}: this trains a model from "
                "scratch; use memlib train or memlib.pretrained.finetune.Finetuning"
            )
        self.config, training = config, config.training
        torch.set_num_threads(training.num_threads)
        set_seed(training.seed)
        self.ranks = join(config)
        self.device = self.ranks.device
        self.task = self.make_task(config.task)
        self.stages = [
            (s.from_step, self.make_task(override(config.task, s.set))) for s in training.curriculum
        ]
        model = MemoryTransformer(config).to(self.device)
        parameters = count_parameters(model) - model.embedding.weight.numel()
        self.model = distribute(model, config.parallel, self.ranks)
        self.monitor = Monitor(self.model, config, self.ranks, parameters)
        self.pipeline = self.model if isinstance(self.model, Pipeline) else None
        self.loss, self.correct = loss_of(config.parallel, self.ranks)
        self.loss_scale = LossScale(config.parallel.mixed_precision)
        self.optimizer = make_optimizer(self.model, training)
        self.schedule = make_schedule(self.optimizer, training)
        self.step, self.cpu_seconds = 0, 0.0
        self.carried: MemoryState | None = None
        self.folder = Path(folder) if folder is not None else None
        self.saver = Saver(self.ranks, training.async_save)
        if self.folder is not None:
            self.open_folder(self.folder, resume)

    # -------------------------------------------------------------------------------------- the loop

    def train(
        self,
        until: int | None = None,
        progress: bool = True,
        on_step: Callable[[int, dict[str, float]], bool] | None = None,
    ) -> dict[str, float]:
        """Train up to step `until` (default: the configured end); returns the last log record.

        `on_step(step, record)` is called after each step; if it returns false, training ends. With a folder,
        Ctrl-C and SIGTERM to any process end it after a step, save, and raise TrainingStopped on all.
        """
        if self.ranks.count > 1 and self.pipeline is None and attached_stores(self.model):
            raise ConfigError(
                f"a store is attached to the model, and {self.ranks.count} processes train it: a state's "
                "place in a store names a file of one process; use memlib.models.stores.detach_stores"
            )
        training, record = self.config.training, {}
        end = training.max_steps if until is None else min(until, training.max_steps)
        log = None
        if self.folder and self.ranks.main:
            if self.step:  # resumed, maybe with other training options
                save_config(self.config, self.folder / "config.yaml")
            log = RunLog(self.folder, self.step)
        if self.folder:
            made_by = environment(self.ranks)
            if log:
                log.describe(made_by)
        bar = tqdm(
            total=end,
            initial=self.step,
            disable=not (progress and self.ranks.main),
            unit="step",
            mininterval=0.5,
        )
        with bar, log or nullcontext(), StopSignals(self.folder is not None) as signals:
            while self.step < end and not self.out_of_time():
                before = time.process_time()
                shown = (self.step + 1) % training.log_steps == 0 or self.step + 1 == end
                with self.monitor.listening(shown):
                    record = self.train_step()
                spent = self.cpu_seconds + self.ranks.sum([time.process_time() - before])[0]
                self.cpu_seconds, signal, failed = self.ranks.most(
                    [spent, signals.received, self.saver.failed]
                )
                if failed:
                    self.saver.wait()
                self.step += 1
                bar.update()
                last = self.step == end or self.out_of_time()
                if shown or last:
                    seen = self.monitor.report()
                    bar.set_postfix_str(
                        f"loss {record['loss']:.3f}, accuracy {record['accuracy']:.3f}, "
                        f"{format_params(round(seen['tokens_per_second']))} tokens/s"
                    )
                    if log:
                        log.write(self.step, cpu_seconds=self.cpu_seconds, **record, **seen)
                if self.folder and (self.step % training.save_steps == 0 or last or signal):
                    self.save()
                self.stop_if(signal)
                if self.folder and (self.step % training.eval_steps == 0 or last):
                    score = self.evaluate()
                    if log:
                        log.write(self.step, test_accuracy=score.accuracy, test_loss=score.loss)
                if on_step is not None and not on_step(self.step, record):
                    break
            self.saver.wait()
            self.stop_if(self.ranks.most([signals.received])[0])
        return record

    def stop_if(self, signal: float) -> None:
        """Save and raise TrainingStopped if there was a signal; 0: none."""
        if signal:
            path = self.save()
            self.saver.wait()
            raise TrainingStopped(int(signal), self.step, path)

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns loss, accuracy, gradient norm, rates and the routers' loss, if any."""
        training = self.config.training
        self.model.train()
        task = self.task_at(self.step)
        if self.step and task is not self.task_at(self.step - 1):
            self.carried = None  # the rows of a text now continue elsewhere
        count = training.gradient_accumulation_steps
        batches = [
            task.batch(training.batch_size, self.step * count + i, training.seed) for i in range(count)
        ]
        positions = sum(int(batch.scored.sum()) for batch in batches)
        self.monitor.tokens += sum(batch.real_tokens for batch in batches)
        loss, right, routing, before = 0.0, 0, 0.0, self.carried
        for number, batch in enumerate(batches, self.step * count):
            batch_loss, batch_right, batch_routing = self.backward(batch, task, positions, number)
            loss, right, routing = loss + batch_loss, right + batch_right, routing + batch_routing
        loss, hits = self.ranks.sum([loss, right])
        parameters = list(self.model.parameters())
        fill_missing(parameters)
        self.loss_scale.divide(parameters)
        norm = clip(parameters, training.max_grad_norm or math.inf, self.ranks)
        rates = {f"lr_{g['name']}": g["lr"] for g in self.optimizer.param_groups}
        if not self.loss_scale.overflowed(norm):
            check_finite(
                loss,
                norm,
                self.step,
                self.model,
                self.optimizer,
                training.max_grad_norm,
                self.folder,
                partial(self.read_again, batches, task, before) if self.pipeline is None else None,
                self.ranks,
            )
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        record = {"loss": loss, "accuracy": hits / positions, "grad_norm": norm, **rates}
        if self.loss_scale.used:
            record["loss_scale"] = self.loss_scale.value
        return record | ({"router_loss": routing} if routing else {})

    def backward(self, batch: Batch, task: Task, positions: int, number: int = 0) -> tuple[float, int, float]:
        """Accumulate the gradients of this rank's rows of batch `number`, part by part.

        Returns their share of the loss, the number of correct predictions, and the batch's share of the
        routers' losses, which are added for the gradient and reported separately.
        """
        rows = self.ranks.rows(len(batch.starts))
        whole, batch = batch, batch.rows(rows).to(self.device)
        state = None
        if task.continues and self.carried is not None:
            state = self.model.reset(self.carried, batch.starts)
        loss, right, routing, length = 0.0, 0, 0.0, batch.tokens.shape[1]
        horizon = (self.config.training.horizon or task.segments) * task.segment_length
        weight = self.ranks.data_size * self.loss_scale.value  # ranks' gradients are averaged
        for start in range(0, length, horizon):
            part, noise = slice(start, start + horizon), self.noise(number, start, rows)
            if self.pipeline is not None:
                seen = batch.tokens[:, part], batch.targets[:, part], batch.scored[:, part]
                state, summed, hits = self.pipeline.learn(*seen, state, weight / positions, noise)
                loss, right = loss + summed / positions, right + hits
                continue
            more = batch.borders(part, task.segment_length)
            output = self.model(batch.tokens[:, part], memory_state=state, noise=noise, **more)
            state = output.memory_state.detach()
            where = batch.targets[:, part], batch.scored[:, part]
            total = output.logits.new_zeros(())
            if output.router_losses:
                share = output.logits.shape[1] / length / self.config.training.gradient_accumulation_steps
                total = share * torch.stack(list(output.router_losses.values())).sum()
                routing += float(total.detach())
            if bool(whole.scored[:, part].any()):  # of all ranks, which must all do the same
                piece = self.loss(output.logits, *where) / positions
                total = total + piece
                loss += float(piece.detach())
                right += self.correct(output.logits, *where)
            if total.requires_grad:
                (total * weight).backward()
        self.carried = state if task.continues else None
        return loss, right, routing

    def read_again(self, batches: list[Batch], task: Task, carried: MemoryState | None) -> None:
        """Pass a step's batches through the model once more, without gradients, as the step did."""
        self.carried, count = carried, len(batches)
        with torch.no_grad():
            for number, batch in enumerate(batches, self.step * count):
                self.backward(batch, task, 1, number)

    def noise(self, number: int, start: int, rows: slice) -> Noise | None:
        """The dropout of some rows in batch `number` from a token on; None without dropout."""
        if not self.config.model.dropout:
            return None
        numbers = torch.arange(rows.start, rows.stop, device=self.device)
        return Noise.of(self.config.training.seed, number, start, numbers)

    def make_task(self, config: TaskConfig) -> Task:
        """Build a task; raises ConfigError if its vocabulary is too large, ValueError for too few data."""
        task = make_task(config, self.config.model.segment_length)
        if task.vocab_size > self.config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size = {self.config.model.vocab_size}: task {config.name} has "
                f"{task.vocab_size} tokens; raise it to that"
            )
        # Fail now, not after hours, if the text is too short.
        batch = task.batch(self.config.training.batch_size, 0)
        if self.ranks.size("stage") > 1 and (batch.mask is not None or batch.fresh is not None):
            raise ConfigError(
                "parallel.pipeline_parallel_size: stages read rows without padding, and documents "
                "begin inside those of task.text.documents = lanes or buckets; use joined, or "
                "distributed_strategy: fsdp"
            )
        task.test_rows(1)
        return task

    def task_with(self, **changes: Any) -> Task:
        """The run's task with changed options and a fixed length, e.g. `task_with(segments=32)`."""
        return self.make_task(override(self.config.task, {"segments_min": None, **changes}))

    def task_at(self, step: int) -> Task:
        """The task at a step of the curriculum."""
        begun = [task for first, task in self.stages if first <= step]
        return begun[-1] if begun else self.task

    def out_of_time(self) -> bool:
        limit = self.config.training.max_cpu_seconds
        return limit is not None and self.cpu_seconds >= limit

    def evaluate(self, examples: int | None = None, memory: bool = True, **task_changes: Any) -> Score:
        """Score the model on the test split, e.g. `evaluate(segments=32)`; memory=False ablates memory."""
        config = override(self.config.task, {"segments_min": None, **task_changes})
        same = config == self.config.task  # reading a text again would take seconds
        task = self.task if same else make_task(config, self.config.model.segment_length)
        return evaluate(self.model, task, examples or self.config.training.eval_examples, memory=memory)

    # -------------------------------------------------------------------------------- save and resume

    def open_folder(self, folder: Path, resume: bool) -> None:
        found = checkpoint_to_resume(folder, resume)
        folder.mkdir(parents=True, exist_ok=True)
        if found is not None:
            self.load(found)
        elif self.ranks.main:
            save_config(self.config, folder / "config.yaml")

    def save(self) -> Path:
        """Write a checkpoint of the current step and delete the oldest ones."""
        if self.folder is None:
            raise ValueError("this trainer has no folder to save in: use Trainer(config, folder=…)")
        progress = progress_of(self.step, self.cpu_seconds, self.schedule, self.config)
        progress["loss_scale"] = [self.loss_scale.value, self.loss_scale.good_steps]
        path = self.folder / "checkpoints" / f"step-{self.step:07d}"
        keep = self.config.training.keep_checkpoints
        self.saver.wait()
        if not self.ranks.gather(path.exists())[0]:
            if self.ranks.mesh is None:
                save_checkpoint(self.model, path, self.optimizer, self.carried, progress)
            else:
                tensors = collect(self.model, self.optimizer, self.carried, self.ranks)
                self.saver.save(tensors, progress, path, keep)
        if self.ranks.mesh is None:
            prune_checkpoints(self.folder, keep)
        return path

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue from a checkpoint; only training options may differ from the saved ones.

        If they change the position of a text's rows, the memory starts from an empty state.
        """
        progress, memory = resume_checkpoint(
            Path(path),
            self.model,
            self.optimizer,
            self.schedule,
            self.config,
            ("model", "memory", "task"),
            self.ranks,
        )
        self.step, self.cpu_seconds = progress["step"], progress["cpu_seconds"]
        if self.loss_scale.used and progress.get("loss_scale", [1])[0] > 1:  # a run in float32 has none
            self.loss_scale.value, self.loss_scale.good_steps = progress["loss_scale"]
        saved, mine = progress["config"], to_dict(self.config)
        data_position = ("seed", "batch_size", "gradient_accumulation_steps")
        self.carried = None
        if memory is not None and all(
            saved["training"][name] == mine["training"][name] for name in data_position
        ):
            rows = self.ranks.rows(self.config.training.batch_size)
            template = self.model.init_state(rows.stop - rows.start)
            self.carried = refill(template, memory).to(self.device)


def load_run(folder: str | os.PathLike[str]) -> Trainer:
    """Open a trained run from its folder at its newest checkpoint; one process opens any run.

    Raises CheckpointError if the folder holds no checkpoint.
    """
    newest_checkpoint(folder)
    config = load_config(Path(folder, "config.yaml"))
    if os.environ.get("WORLD_SIZE", "1") == "1" and not dist.is_initialized():
        config.parallel = ParallelConfig(mixed_precision=config.parallel.mixed_precision)
    return Trainer(config, folder, resume=True)


def load_model(folder: str | os.PathLike[str]) -> MemoryTransformer:
    """Load a trained run's model at its newest checkpoint, in eval mode; the run's data are not needed.

    Raises CheckpointError if the folder holds no checkpoint.
    """
    path, config = newest_checkpoint(folder), load_config(Path(folder, "config.yaml"))
    model = MemoryTransformer(config)
    load_checkpoint(path, model)
    return model.to(config.training.device).eval()


def consolidate(run: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write a run's newest checkpoint as a run of one process, which holds the model in one safetensors file.

    Returns the new checkpoint's folder. Raises CheckpointError if the run has none, FileExistsError if `out`
    already holds a run.
    """
    path, config = newest_checkpoint(run), load_config(Path(run, "config.yaml"))
    checkpoint_to_resume(Path(out), resume=False)
    before = random_state()
    try:
        model = MemoryTransformer(config)
        optimizer = make_optimizer(model, config.training)
        progress, memory = load_checkpoint(path, model, optimizer, restore_random=True)
        state = None if memory is None else refill(model.init_state(config.training.batch_size), memory)
        save_config(config, Path(out, "config.yaml"))
        return save_checkpoint(model, Path(out, "checkpoints", path.name), optimizer, state, progress)
    finally:
        restore_random_state(*before)


def newest_checkpoint(folder: str | os.PathLike[str]) -> Path:
    found = latest_checkpoint(folder)
    if found is None:
        raise CheckpointError(f"{folder}: no checkpoint here; train one with memlib train … --out {folder}")
    return found
