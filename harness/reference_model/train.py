"""Training of the reference model: ``kvscope backbone train --out DIR``.

One phase after another; after each a checkpoint that the next run can start from (``--resume``). A phase has either a
fixed number of steps or a time budget, from which the number of steps is set once, by timing, before its first update:
the learning rate depends on the step alone, and the number is written to the log so that the run can be repeated.
"""

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from kvscope.errors import UsageError, did_you_mean
from kvscope.files import make_folder
from kvscope.harness.reference_model.architecture import Afmoe
from kvscope.harness.reference_model.backbone import Backbone
from kvscope.harness.reference_model.curriculum import Phase
from kvscope.harness.reference_model.data import PhaseData, batches
from kvscope.harness.reference_model.documents import DocumentMaker
from kvscope.harness.reference_model.documents_long_qa import LongQADocuments
from kvscope.harness.reference_model.documents_ruler import coded_words, common_words, variable_chains
from kvscope.harness.reference_model.form_rows import FAMILIES as FORM_FAMILIES
from kvscope.harness.reference_model.form_validation import SHAPES, validate
from kvscope.harness.reference_model.phases import steps_before
from kvscope.harness.reference_model.pieces import Pieces
from kvscope.harness.reference_model.replicas import Replicas
from kvscope.harness.reference_model.row_maker import RowMaker
from kvscope.harness.reference_model.tokenizer import EOS_ID, save_tokenizer
from kvscope.harness.reference_model.trainer import STATE_FILE, Trainer
from kvscope.harness.reference_model.v4.architecture import DeepseekV4

BACKBONES: dict[str, type[Backbone]] = {each.name: each for each in (Afmoe, DeepseekV4)}
"""Architectures that can be trained, by name."""


def backbone_of(name: str) -> Backbone:
    """Return an architecture by its name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in BACKBONES:
        raise UsageError(f"--architecture: there is no {name!r}.{did_you_mean(name, BACKBONES)}")
    return BACKBONES[name]()


def read_state(folder: Path) -> dict[str, Any]:
    """Return the training state of a checkpoint.

    Raises:
        UsageError: the folder has none, or one that is not whole.
    """
    try:
        state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        message = f"--resume: '{folder}' has no {STATE_FILE}; name a folder that training has written."
        raise UsageError(message) from None
    except ValueError:
        state = {}
    if not isinstance(state, dict) or not isinstance(state.get("phases"), list):
        raise UsageError(f"--resume: {STATE_FILE} of '{folder}' is not whole; name a folder that training has written.")
    return state


def document_makers() -> dict[str, DocumentMaker]:
    """Return the document families a phase can name."""
    return {
        "long_qa": LongQADocuments(version=1),
        "long_qa_2": LongQADocuments(version=2),
        "vt": variable_chains,
        "vt_fixed": partial(variable_chains, composed=False),
        "cwe": common_words,
        "fwe": coded_words,
    }


def versions() -> dict[str, str]:
    """Return the versions that a repeat of the run must match."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def train(
    *,
    out: Path,
    phases: tuple[Phase, ...] | None = None,
    resume: Path | None = None,
    seconds: tuple[float, ...] | None = None,
    seed: int = 0,
    workers: int = 0,
    max_seconds: float | None = None,
    replicas: int = 1,
    config: PreTrainedConfig | None = None,
    backbone: Backbone | None = None,
    after_phase: Callable[[PreTrainedModel, PreTrainedTokenizerFast, Phase], dict[str, Any]] | None = None,
    validation: bool = False,
    validation_shapes: Sequence[tuple[int, int, int]] = SHAPES,
) -> Trainer:
    """Train the phases in order and write a checkpoint into ``out`` after each.

    Args:
        phases: none: all of the architecture's.
        backbone: none: the reference model's.
        config: of another shape than the architecture's own (tests, trials).
        resume: a checkpoint folder to start from (weights; the optimizer starts afresh with a warm-up). A first phase
            that the checkpoint was stopped in goes on behind its last step, with that step's learning rate and batches.
        seconds: time budget of each phase, instead of its steps; of what is left, where a phase goes on.
        max_seconds: stop at this age of the run, with a checkpoint.
        replicas: batches a step, their gradients averaged; dealt out over the processes of ``torchrun``.
        validation: after each phase that has form families, log the accuracy of every family and length.
        validation_shapes: its row lengths (see ``form_validation.validate``).
        after_phase: called with model and tokenizer; what it returns is logged.
    """
    began = time.perf_counter()
    make_folder(out)
    team = Replicas(replicas)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    backbone = backbone or Afmoe()
    state = read_state(resume) if resume is not None else None
    model = backbone.build(config or backbone.config(), seed=seed)
    if resume is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(resume)
        loaded = AutoModelForCausalLM.from_pretrained(resume, dtype=torch.float32, trust_remote_code=False)
        if loaded.config.model_type != model.config.model_type:
            raise UsageError(
                f"--resume: '{resume}' is a {loaded.config.model_type} model, not {model.config.model_type}; "
                "name its architecture with --architecture."
            )
        model.load_state_dict(loaded.state_dict())
    else:
        if team.leads and not (out / "tokenizer.json").exists():
            save_tokenizer(out, seed=seed)
        team.wait()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    maker = RowMaker(Pieces(tokenizer), document_makers())
    trainer = Trainer(
        model, device=device, out=out, compile_layers=device.type == "cuda", replicas=team, backbone=backbone
    )
    if state is not None:
        trainer.history, trainer.step, trainer.start_step = state["phases"], state["step"], state["step"]
    trainer.log(
        versions=versions(),
        architecture=backbone.name,
        optimizer=backbone.optimizer,
        seed=seed,
        replicas=team.total,
        processes=team.world,
        parameters=sum(p.numel() for p in model.parameters()),
    )
    phases = phases or backbone.phases
    first_step = steps_before(trainer.history, phases[0].name)[0]
    for i, phase in enumerate(phases):
        trainer.begin(phase)
        if i:
            first_step = 0
        if first_step:
            trainer.log(phase=phase.name, goes_on_behind_step=first_step)
        total_share = sum(shape.share for shape in phase.shapes)
        per_step = 0.0
        for shape in phase.shapes:
            one = PhaseData(maker, replace(phase, shapes=(shape,), steps=1), seed=-1 - seed)[0]
            difference = trainer.check_against_stock(one)
            trainer.log(phase=phase.name, tokens=shape.tokens, difference_to_stock=round(difference, 5))
            if seconds is not None:
                per_step += trainer.seconds_per_step(one) * shape.share / total_share
        if seconds is not None:
            # A process holds so many replicas a step.
            steps = int(seconds[i] / (1.15 * per_step * len(team.mine)))
            phase = replace(phase, steps=first_step + team.agreed(max(1, steps)))
            trainer.log(phase=phase.name, s_per_step=round(per_step, 4), steps=phase.steps)
        if phase.steps <= first_step:
            raise UsageError(f"{resume} has {first_step} steps of {phase.name} behind it: --steps must be more.")
        data = PhaseData(maker, phase, seed=seed, replicas=team.mine, first_step=first_step)
        source = iter(batches(data, workers=workers))
        deadline = None if max_seconds is None else began + max_seconds
        try:
            trainer.run_phase(phase, source, deadline=deadline, first_step=first_step)
        finally:  # a failed phase leaves what it has learnt
            del source
            trainer.save(tokenizer, seed=seed, versions=versions(), seconds=round(time.perf_counter() - began, 1))
        team.wait()
        if validation and team.leads and any(name in FORM_FAMILIES for name, _ in phase.documents):
            validate(
                model,
                maker,
                end_id=EOS_ID,
                workers=workers,
                shapes=validation_shapes,
                note=partial(trainer.log, validation=phase.name),
            )
        team.wait()
        if after_phase is not None:
            trainer.log(phase=phase.name, **after_phase(model, tokenizer, phase))
        if team.agreed(int(deadline is not None and time.perf_counter() > deadline)):
            trainer.log(stopped="max_seconds", phase=phase.name)
            break
    team.leave()
    return trainer
