"""Train what an adapter adds to a pretrained model, on conversations or on documents.

    run = Finetuning(load_config("my.yaml"), "runs/mine")
    run.train()                                   runs/mine/adapter: what save_pretrained writes

| training.training_mode | a batch | memory |
| --- | --- | --- |
| instruction_finetuning | conversations, labelled where the assistant speaks | empty for each conversation |
| pretraining | packed rows of documents | carried from batch to batch, reset where a row starts |

The loss of a step is the mean over all labelled tokens of its batches. Gradients stop between two batches,
and the base's attention starts anew with each row. A checkpoint holds what was added, the optimizer, the
memory and the position in the data. So a run that was killed and resumed repeats an uninterrupted one bit
for bit.

Axes: b batch, t tokens of a row.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from memlib.config import Config, ConfigError, save_config
from memlib.models import MemoryState
from memlib.pretrained.adapter import MemoryAdapter
from memlib.pretrained.fitting import load_with_tokenizer, with_chat_template
from memlib.pretrained.runs import ADAPTER
from memlib.tasks.instructions import IGNORED, Instructions
from memlib.tasks.packing import packed
from memlib.tasks.scoring import correct, scored_cross_entropy
from memlib.training.checkpoint import prune_checkpoints, save_checkpoint, set_seed
from memlib.training.divergence import check_finite
from memlib.training.log import RunLog
from memlib.training.optimizer import make_schedule
from memlib.training.parallel.gradients import clip
from memlib.training.parallel.ranks import Ranks
from memlib.training.resume import checkpoint_to_resume, progress_of, resume_checkpoint
from memlib.training.stopping import StopSignals, TrainingStopped

MODES = ("pretraining", "instruction_finetuning")


class Finetuning:
    """One run of training an adapter, in a folder.

    base, tokenizer: None loads those that the configuration names; download: allow fetching the model from
    the hub. Raises ConfigError for options that do not apply, and FileExistsError if the folder already holds
    a run and resume is false. There is no evaluation: measure the saved adapter.
    """

    def __init__(
        self,
        config: Config,
        folder: str | os.PathLike[str],
        resume: bool = False,
        base: Any = None,
        tokenizer: Any = None,
        download: bool = False,
    ) -> None:
        check_options(config)
        self.config, self.folder, training = config, Path(folder), config.training
        found = checkpoint_to_resume(self.folder, resume)
        torch.set_num_threads(training.num_threads)
        set_seed(training.seed)
        if base is None or tokenizer is None:
            base, tokenizer = load_with_tokenizer(config, download)
        self.tokenizer = with_chat_template(tokenizer, config)
        self.adapter = MemoryAdapter(config, base.to(training.device))
        if training.gradient_checkpointing:
            self.adapter.activation_checkpointing_enable()
        self.data = self.open_data()
        self.optimizer = torch.optim.AdamW(self.trained_groups())
        self.schedule = make_schedule(self.optimizer, training)
        self.step, self.cpu_seconds = 0, 0.0
        self.carried: MemoryState | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        if found is not None:
            self.load(found)
        save_config(config, self.folder / "config.yaml")

    def open_data(self) -> Any:
        """The batches that the mode asks for: an endless iterator with a position."""
        task, training = self.config.task, self.config.training
        if training.training_mode == "instruction_finetuning":
            return Instructions(task.instructions, self.tokenizer, training.batch_size, training.seed)
        return packed(task.documents, self.tokenizer, training.batch_size, training.seed)

    def trained_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups; raises ConfigError if there are none."""
        groups = self.adapter.get_parameter_groups()
        if not groups:
            raise ConfigError(
                "adapter: nothing to train; name memories in memory.kinds, or set adapter.use_lora: true or "
                "adapter.freeze_base_model: false"
            )
        return groups

    # -------------------------------------------------------------------------------------- the loop

    def train(self, until: int | None = None, progress: bool = True) -> dict[str, float]:
        """Train up to step `until` (default: the configured end) and save the adapter; returns the last log
        record, which is empty if no step was left. Ctrl-C and SIGTERM save and raise TrainingStopped."""
        training, record = self.config.training, {}
        end = training.max_steps if until is None else min(until, training.max_steps)
        bar = tqdm(total=end, initial=self.step, disable=not progress, unit="step", mininterval=0.5)
        with bar, RunLog(self.folder, self.step) as log, StopSignals() as signals:
            while self.step < end and not self.out_of_time():
                before = time.process_time()
                record = self.train_step()
                self.cpu_seconds += time.process_time() - before
                self.step += 1
                bar.update()
                last = self.step == end or self.out_of_time()
                if self.step % training.log_steps == 0 or last:
                    bar.set_postfix(loss=f"{record['loss']:.3f}")
                    log.write(self.step, cpu_seconds=self.cpu_seconds, **record)
                if self.step % training.save_steps == 0 or last or signals.received:
                    saved = self.save()
                    if signals.received:
                        raise TrainingStopped(signals.received, self.step, saved)
        self.adapter.eval().save_pretrained(self.folder / ADAPTER)
        return record

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns loss, accuracy, gradient norm, rates and the memories' loss, if any."""
        training = self.config.training
        self.adapter.train()
        batches = [next(self.data) for _ in range(training.gradient_accumulation_steps)]
        positions = max(1, sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches))
        parts = [self.backward(batch, positions) for batch in batches]
        loss, right, routing = (sum(column) for column in zip(*parts, strict=True))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = clip(parameters, training.max_grad_norm or math.inf, Ranks(torch.device(training.device)))
        check_finite(loss, norm, self.step, self.adapter, self.optimizer, training.max_grad_norm, self.folder)
        rates = {f"lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        record = {"loss": loss, "accuracy": right / positions, "grad_norm": norm, **rates}
        return record | ({"router_loss": routing} if routing else {})

    def backward(self, batch: dict[str, Tensor], positions: int) -> tuple[float, int, float]:
        """Accumulate the gradients of one batch; positions: labelled tokens of the whole step.

        Returns the batch's share of the loss, the number of correct predictions, and its share of the losses
        that memories add for the gradient.
        """
        batch = {name: tensor.to(self.adapter.device) for name, tensor in batch.items()}
        ids, labels, starts = batch["input_ids"], batch["labels"][:, 1:], batch.get("starts")
        state = None
        if starts is not None and self.carried is not None:
            state = self.adapter.reset(self.carried, starts)
        mask = None if bool(batch["attention_mask"].all()) else batch["attention_mask"]
        output = self.adapter(ids, attention_mask=mask, memory_state=state)
        assert output.logits is not None and output.memory_state is not None
        where = output.logits[:, :-1], labels, labels != IGNORED
        loss = scored_cross_entropy(*where) / positions
        routing = torch.zeros_like(loss)
        for extra in (output.router_losses or {}).values():
            routing = routing + extra / self.config.training.gradient_accumulation_steps
        (loss + routing).backward()
        if starts is not None:
            self.carried = output.memory_state.detach()
        return float(loss.detach()), correct(*where), float(routing.detach())

    def out_of_time(self) -> bool:
        limit = self.config.training.max_cpu_seconds
        return limit is not None and self.cpu_seconds >= limit

    # -------------------------------------------------------------------------------- save and resume

    def save(self) -> Path:
        """Write a checkpoint of the current step and delete the oldest ones."""
        progress = progress_of(self.step, self.cpu_seconds, self.schedule, self.config)
        path = self.folder / "checkpoints" / f"step-{self.step:07d}"
        if not path.exists():
            progress["data"] = self.data.state_dict()
            save_checkpoint(self.adapter, path, self.optimizer, self.carried, progress)
        prune_checkpoints(self.folder, self.config.training.keep_checkpoints)
        return path

    def load(self, path: Path) -> None:
        """Continue from a checkpoint; only training options may differ from the saved ones.

        Raises CheckpointError, and ValueError if the saved position belongs to other data or another batch.
        """
        fixed = ("model", "memory", "task", "adapter")
        progress, memory = resume_checkpoint(
            path, self.adapter, self.optimizer, self.schedule, self.config, fixed
        )
        self.data.load_state_dict(progress["data"])
        self.step, self.cpu_seconds = progress["step"], progress["cpu_seconds"]
        if memory is not None:
            template = self.adapter.init_state(self.config.training.batch_size)
            self.carried = template.load(memory).to(self.adapter.device)


def check_options(config: Config) -> None:
    """Raise ConfigError for options that this loop does not have, rather than ignore them."""
    training, rows = config.training, config.task.documents.row_length
    if training.training_mode not in MODES:
        raise ConfigError(
            f"training.training_mode = {training.training_mode!r}: is not trained on batches of data; use "
            f"memlib train, or one of {', '.join(MODES)}"
        )
    for name in ("curriculum", "horizon"):
        if getattr(training, name):
            raise ConfigError(
                f"training.{name} = {getattr(training, name)}: is for training from scratch; with a "
                f"pretrained base gradients flow through one row, so leave it at its default"
            )
    if (
        training.training_mode == "pretraining"
        and config.adapter.mode == "segment"
        and rows % config.model.segment_length
    ):
        raise ConfigError(
            f"task.documents.row_length = {rows}: with adapter.mode: segment it must be a multiple of "
            f"model.segment_length = {config.model.segment_length}, so that no segment is cut in two"
        )
