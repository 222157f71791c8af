"""One phase of training: forward, loss, update, log, checkpoint, and the check that the forward is the stock one."""

import copy
import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kvscope.files import TextFile, whole_file, writing
from kvscope.harness.reference_model.architecture import Afmoe
from kvscope.harness.reference_model.backbone import Backbone, Losses
from kvscope.harness.reference_model.captured import CapturedSteps
from kvscope.harness.reference_model.curriculum import ENOUGH_STEPS, Phase
from kvscope.harness.reference_model.data import Batch
from kvscope.harness.reference_model.family_accuracy import FamilyAccuracy
from kvscope.harness.reference_model.muon import Muon
from kvscope.harness.reference_model.replicas import Replicas
from kvscope.harness.reference_model.tokenizer import write_tokenizer
from kvscope.terminal import say

LOG_STEPS = 100
AGREE_STEPS = 8
# Each shape's forward is held against the stock model's, on so many tokens, before its first step.
CHECK_TOKENS = 1024
# Rows longer than this compute their activations twice instead of keeping them (64K rows peak at 14 GiB). Attention,
# nearly all of such a row's time, is kept all the same: its output is small.
KEEP_TOKENS = 65_536
# Rows this long run without compilation: attention is most of their time, and compiling a shape takes 15 to 20 s.
EAGER_TOKENS = 131_072
_KEPT_OPERATIONS = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
WEIGHT_DECAY = 0.02
# Muon's learning rate over AdamW's (its updates are scaled to the root mean square of AdamW's).
MUON_LR = 2.0
STATE_FILE = "training_state.json"
# Shards stay small so that each can be moved on its own.
SHARD_BYTES = "15MB"


def synchronise(device: torch.device) -> None:
    """Wait until a device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Trainer:
    """Holds model, optimizer and log of one training run."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: torch.device,
        out: Path,
        compile_layers: bool,
        replicas: Replicas | None = None,
        backbone: Backbone | None = None,
    ) -> None:
        self.model, self.device, self.out = model.to(device).train(), device, out
        self.replicas = replicas or Replicas(1)
        self.backbone = backbone or Afmoe()
        self._parameters = list(model.parameters())
        self._capture = self.backbone.captured and compile_layers and self.device.type == "cuda"
        self._captured: CapturedSteps | None = None
        self.step = self.start_step = 0
        self._losses: Losses = self._answers
        self._begin_objective("answers")
        if compile_layers:
            self.backbone.compile(model)
        self.history: list[dict[str, Any]] = []
        self._log_file = TextFile(out / "train_log.jsonl", append=True) if self.replicas.leads else None

    @property
    def captured(self) -> bool:
        """Whether steps are launched as CUDA graphs, once there was one that can be."""
        return self._capture and self._captured is not None

    def begin(self, phase: Phase) -> None:
        """Bring the model into a phase's mode; another objective than the last starts with fresh optimizers."""
        self.backbone.begin(self.model, phase)
        self._losses = self.backbone.losses(self.model, phase, self._answers)
        if phase.objective != self._objective:
            self._begin_objective(phase.objective)

    def _begin_objective(self, objective: str) -> None:
        self._objective, self.start_step = objective, self.step
        self._captured = None
        self.model.zero_grad(set_to_none=True)
        trained = []
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.backbone.trains(name, objective))
            if parameter.requires_grad:
                trained.append((name, parameter))
        muon = self.backbone.optimizer == "muon"
        matrices = [p for name, p in trained if muon and self.backbone.by_muon(name, p)]
        hidden = {id(p) for p in matrices}
        rest = [p for _, p in trained if id(p) not in hidden]
        self.muon = Muon(matrices, weight_decay=WEIGHT_DECAY)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
                {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=0.0,
            betas=(0.9, 0.95),
            fused=self.device.type == "cuda",
        )

    def log(self, **fields: Any) -> None:
        """Write one line to the log file and to standard output (the first process only)."""
        if self._log_file is None:
            return
        line = json.dumps(fields)
        self._log_file.write(line + "\n")
        say(line)

    def _behind_layers(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """What the last layer gives, in the architecture's own shape; every row starts at position 0."""
        base = self.model.model
        x, given = self.backbone.entering(base, ids_BT)
        for layer in base.layers:
            if ids_BT.shape[1] > KEEP_TOKENS:
                x = checkpoint(
                    layer, x, **given, use_reentrant=False,
                    context_fn=partial(create_selective_checkpoint_contexts, _KEPT_OPERATIONS),
                )  # fmt: skip
            else:
                x = layer(x, **given)
        return x

    def check_against_stock(self, batch: Batch) -> float:
        """Compare training's forward with the stock model's on a row's beginning; returns the relative difference.

        A training forward that sees more than the released model does would learn from what it should not see.

        Raises:
            RuntimeError: they differ by more than bf16 explains.
        """
        stock = self._stock_copy(torch.float32, "eager")
        stock = stock.to(self.device).eval()
        ids_BT = batch.ids_BT.to(self.device)
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"),
            torch.compiler.set_stance("force_eager" if ids_BT.shape[1] >= EAGER_TOKENS else "default"),
        ):
            # With gradients, as in training: without, another graph would be compiled and checked.
            ours_BTM = self.backbone.leaving(self.model.model, self._behind_layers(ids_BT), ids_BT)
            ours_BTM = ours_BTM[:1, :CHECK_TOKENS].detach()
            with torch.no_grad():
                ours_BTM = self.model.model.norm(ours_BTM).float()
                stock_BTM = stock.model(ids_BT[:1, :CHECK_TOKENS]).last_hidden_state.float()
        difference: float = ((ours_BTM - stock_BTM).norm() / stock_BTM.norm()).item()
        if not difference < self.backbone.check_tolerance:
            raise RuntimeError(f"training's forward differs from the stock model's by {difference:.3f} (relative norm)")
        return difference

    def _answers(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross entropy over the scored tokens, and which of them are predicted right [N]."""
        places = (batch.ids_BT, batch.at_N, batch.targets_N)
        return self._answer_loss(*(each.to(self.device, non_blocking=True) for each in places))

    def _answer_loss(
        self, ids_BT: torch.Tensor, at_N: torch.Tensor, targets_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        base = self.model.model
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            x_NM = base.norm(self.backbone.leaving_at(base, self._behind_layers(ids_BT), at_N))
            logits_NV = self.model.lm_head(x_NM).float()
        loss = F.cross_entropy(logits_NV, targets_N)
        return loss, logits_NV.detach().argmax(-1) == targets_N

    def gradients(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the gradients of one batch; returns its loss, and how right each of its scored tokens is [N]."""
        tokens = batch.ids_BT.shape[1]
        if self._capture and self._objective == "answers" and tokens <= KEEP_TOKENS:
            try:
                self._captured = self._captured or CapturedSteps(self._answer_loss, self._parameters)
                return self._captured.gradients(batch)
            except RuntimeError as error:  # slower, and right all the same
                self.log(not_captured=repr(error)[:300], tokens=tokens)
                self._capture = False
        # Around the backward pass, too: checkpointed layers run again there.
        with torch.compiler.set_stance("force_eager" if tokens >= EAGER_TOKENS else "default"):
            loss, right_N = self._losses(batch)
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), right_N

    def update(self, lr: float) -> torch.Tensor:
        """Clip the gradients, take a step with them and zero them; returns their norm before."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.muon.step(lr * MUON_LR)
        self._zero_gradients()
        self.step += 1
        return norm

    def _zero_gradients(self) -> None:
        if self._captured is None:
            self.model.zero_grad(set_to_none=True)
        else:  # a captured step adds to the tensors it was captured with
            torch._foreach_zero_([p.grad for p in self._parameters if p.grad is not None])

    def seconds_per_step(self, batch: Batch) -> float:
        """Time forward and backward without an update (compilation happens here, too)."""
        long = batch.ids_BT.shape[1] >= EAGER_TOKENS
        warm_ups, tries = (1, 1) if long else (3, 12)
        for i in range(warm_ups + tries):
            if i == warm_ups:
                synchronise(self.device)
                start = time.perf_counter()
            self.gradients(batch)
            self._zero_gradients()
        synchronise(self.device)
        return (time.perf_counter() - start) / tries

    def run_phase(self, phase: Phase, source: Iterator[Batch], *, deadline: float | None, first_step: int = 0) -> int:
        """Train one phase; returns its steps done (fewer than planned only past the deadline).

        Args:
            source: the batches of this process's replicas, step by step from ``first_step`` on.
            deadline: on the clock of ``time.perf_counter``; looked at every few steps where processes must agree.
        """
        self.begin(phase)
        start, done, tokens = time.perf_counter(), first_step, 0
        ended, measure = "steps", self.backbone.measure(phase.objective)
        last_right: deque[torch.Tensor] = deque(maxlen=ENOUGH_STEPS * len(self.replicas.mine))
        recent: dict[int, list[torch.Tensor]] = {}
        by_family = FamilyAccuracy(self.device)
        fields: dict[str, Any] = {}
        try:
            for i in range(first_step, phase.steps):
                lr = phase.lr[0] + (phase.lr[1] - phase.lr[0]) * i / max(1, phase.steps - 1)
                warm_lr = lr * min(1.0, (self.step - self.start_step + 1) / phase.warmup_steps)
                for _ in self.replicas.mine:
                    batch = next(source)
                    loss, right_N = self.gradients(batch)
                    tokens += batch.ids_BT.numel()
                    recent.setdefault(batch.ids_BT.shape[1], []).append(torch.stack((loss, right_N.float().mean())))
                    by_family.add(batch, right_N)
                    last_right.append(right_N.float().mean())
                late = deadline is not None and time.perf_counter() > deadline
                raised = self.replicas.average([p.grad for p in self._parameters if p.grad is not None], late)
                norm = self.update(warm_lr)
                done += 1
                if done % max(1, min(LOG_STEPS, phase.steps // 12)) == 0 or done == phase.steps:
                    means = {length: torch.stack(part).mean(0).tolist() for length, part in sorted(recent.items())}
                    recent.clear()
                    took = time.perf_counter() - start
                    fields = {
                        "phase": phase.name, "phase_step": done, "step": self.step, "lr": round(lr, 7),
                        "loss": {length: round(mean[0], 4) for length, mean in means.items()},
                        measure: {length: round(mean[1], 4) for length, mean in means.items()},
                        f"{measure}_by_family": by_family.read(),
                        "grad_norm": round(norm.item(), 3), "phase_s": round(took, 1),
                        "tokens_per_s": round(tokens * self.replicas.world / took),
                    }  # fmt: skip
                    self.log(**fields)
                if raised is not None:  # reading it waits for the device, so only now and then
                    late = done % AGREE_STEPS == 0 and raised.item() > 0
                if late:
                    ended = "deadline"
                    break
                if self._enough(phase, last_right, done):
                    ended = "accuracy"
                    break
        except BaseException:
            ended = "error"
            raise
        finally:
            self.history.append(
                {
                    **asdict(phase),
                    "replicas": self.replicas.total,
                    "first_step": first_step,
                    "steps_done": done,
                    "ended_by": ended,
                    "loss": fields.get("loss"),
                    measure: fields.get(measure),
                    "seconds": round(time.perf_counter() - start, 1),
                }
            )
        return done

    def _enough(self, phase: Phase, last_right: deque[torch.Tensor], done: int) -> bool:
        """Whether the last steps' share of right tokens ends a phase; looked at every few steps, for it waits."""
        if phase.enough is None or done % AGREE_STEPS or len(last_right) < (last_right.maxlen or 0):
            return False
        percent = int(100_000 * torch.stack(tuple(last_right)).mean().item())
        return self.replicas.agreed(percent) >= 100_000 * phase.enough

    def _stock_copy(self, dtype: torch.dtype, implementation: str) -> PreTrainedModel:
        # from_config writes the implementation into the configuration it is given: training's own must not change.
        config = copy.deepcopy(self.model.config)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=implementation
        )
        for name, parameter in model.named_parameters():
            if self.backbone.saved_in_fp32(name):
                parameter.data = parameter.data.float()
        model.load_state_dict(self.model.state_dict())
        return model

    def save(self, tokenizer: PreTrainedTokenizerFast, **state: Any) -> None:
        """Write a released-form checkpoint (bf16 shards, tokenizer) with the training state beside it."""
        if not self.replicas.leads:
            return
        shell = self._stock_copy(torch.bfloat16, self.backbone.stock_attention)
        with writing(self.out):
            shell.save_pretrained(self.out, max_shard_size=SHARD_BYTES)
            write_tokenizer(tokenizer, self.out)
        state |= {"step": self.step, "phases": self.history}
        with whole_file(self.out / STATE_FILE) as temporary:
            temporary.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
