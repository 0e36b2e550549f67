"""A callback for trainers of transformers and TRL: says during the training that the chosen log-probability falls.

    trainer = DPOTrainer(..., callbacks=[DisplacementCallback(stop=True)])

It reads what the trainer logs, and judges it as `displacement diagnose` judges a finished log. With a probe it also
measures a few fixed pairs on the network in training, and shows where the probability goes. The weights that come out
are the ones that would have come out without it.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from sims.diagnosis import Diagnosis, Log, diagnose
from sims.diagnosis.logs import MEASURED, canonical
from sims.files import to_json, write_atomically
from sims.language.model import LanguageModel
from sims.language.probe_set import Probe, Probed
from theory._check import Interval, check_count, check_number

__all__ = ["DisplacementCallback", "DisplacementWarning", "Probe", "Report"]

FILE = "displacement.json"
OFTEN = 200  # log entries up to which each gets a verdict; of n, n / OFTEN share one
ALARMING = ("displaced", "degenerate")


class DisplacementWarning(UserWarning):
    """The chosen log-probability falls."""


@dataclass(frozen=True)
class Report:
    """What the callback saw.

    diagnosis : the verdict on the log so far, None where it says nothing. alarm : step of the alarm, None without one.
    stopped : whether the alarm ended the training. probe : what the probe saw, probe_diagnosis : the verdict on it;
        None without one.
    """

    diagnosis: Diagnosis | None
    alarm: int | None
    stopped: bool
    probe: Probed | None
    probe_diagnosis: Diagnosis | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "alarm_step": self.alarm,
            "stopped": self.stopped,
            "diagnosis": self.diagnosis and self.diagnosis.to_dict(),
            "probe": self.probe and self.probe.to_dict(),
            "probe_diagnosis": self.probe_diagnosis and self.probe_diagnosis.to_dict(),
        }

    def __str__(self) -> str:
        lines = [str(self.diagnosis or "The log holds no reward or log-probability of the chosen responses.")]
        if self.alarm is not None:
            lines.append(f"Alarm at step {self.alarm}{', where the training was stopped' if self.stopped else ''}.")
        if self.probe is not None:
            verdict = self.probe_diagnosis.verdict if self.probe_diagnosis else "undecided"
            lines += [str(self.probe), f"Verdict on the probe: {verdict}."]
        return "\n".join(lines)


class DisplacementCallback(TrainerCallback, ExportableState):
    """Warns, and stops the training if asked to, when the chosen log-probability falls while the margin grows.

    Parameters
    ----------
    beta : of the loss; default the trainer's own (`args.beta`).
    probe : pairs to measure on the network in training, see `Probe.draw`. They are judged like an evaluation
        set, and can raise the alarm, too.
    every : steps between two measurements of the probe.
    patience : verdicts in a row, each on new numbers of what decides, that it takes to be alarmed.
    stop : whether an alarm ends the training.
    threshold : nats by which the mean ln pi of the chosen responses must have fallen for an alarm. The verdict in
        `report` takes a smaller fall seriously.

    The trainer's log gains `displacement/chosen_change`, `/rejected_change` and `/margin_change` (nats per response,
    negative: it fell), `/alarm` (0 or 1), and with a probe `/probe_chosen`, `/probe_rejected`, `/probe_held`. At the
    end `report` is written to <output_dir>/displacement.json. A resumed training goes on from the first one's start.

    Raises ValueError for parameters out of range.
    """

    def __init__(
        self,
        beta: float | None = None,
        *,
        probe: Probe | Mapping[str, Any] | None = None,
        every: int = 50,
        patience: int = 2,
        stop: bool = False,
        threshold: float = 1.0,
    ) -> None:
        positive = Interval(0.0, open_low=True)
        self.beta = None if beta is None else check_number(beta, "beta", positive)
        self.probe = Probe.from_dict(probe) if isinstance(probe, Mapping) else probe
        self.every, self.patience = check_count(every, "every"), check_count(patience, "patience")
        self.stop, self.threshold = bool(stop), check_number(threshold, "threshold", positive)
        self._verdicts: list[Diagnosis | None] = [None, None]  # on the log, on the probe
        self._settings: dict[str, Any] = {}
        self._tokenizer: Any = None
        self._forget()

    def _forget(self) -> None:
        self.alarm: int | None = None
        self.stopped = False
        self.streak = 0
        self.judged: list[float] = []  # the last step that each alarming verdict saw
        self.steps: list[int] = []
        self.log_probs: list[Any] = []  # (T, n, 2 + candidates)

    # ---- events of the trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tokenizer = kwargs.get("processing_class")
        self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self._forget()
        if state.global_step:
            self._restore(state.stateful_callbacks.get(type(self).__name__))
        names = {"beta": "beta", "loss": "loss_type", "ld_alpha": "ld_alpha"}
        self._settings = {name: getattr(args, key, None) for name, key in names.items()}
        self._settings["beta"] = self.beta or self._settings["beta"] or None
        if getattr(args, "sync_ref_model", False) and state.is_world_process_zero:
            said = (
                "sync_ref_model moves the reference: the log's rewards are not changes since the start, only a probe's"
            )
            warnings.warn(said, DisplacementWarning, stacklevel=2)
        if not self.steps:
            self._measure(state.global_step, kwargs.get("model"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self._measure(state.global_step, kwargs.get("model"))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """Evaluations are logged, too: this sees them all."""
        history = state.log_history
        if not logs or not (_measured(logs) or state.global_step in self.steps[1:]):
            return control
        if len(history) % (1 + len(history) // OFTEN):  # a verdict reads the whole log
            return control
        alarming = self._judge(history)
        last = [_last(verdict, state.global_step) for verdict in alarming]
        if last != self.judged or not alarming:  # what says nothing new does not count again
            self.judged, self.streak = last, self.streak + 1 if alarming else 0
        if self.streak >= self.patience and self.alarm is None:
            self.alarm, self.stopped = state.global_step, self.stop
            if state.is_world_process_zero:
                warnings.warn(self._said(alarming[0]), DisplacementWarning, stacklevel=2)
        if self.stopped:
            control.should_training_stop = True
        found = self._metrics()
        logs.update(found)  # for callbacks that come later
        state.log_history[-1].update(found)  # for trainer_state.json
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Where the best model is loaded at the end, the network is no longer that of this step.
        if not getattr(args, "load_best_model_at_end", False):
            self._measure(state.global_step, kwargs.get("model"))
        self._judge(state.log_history)
        if state.is_world_process_zero:
            write_atomically(Path(args.output_dir) / FILE, to_json(self.report.to_dict()))

    # ---- what it saw

    @property
    def report(self) -> Report:
        """What was seen so far."""
        probed = None
        if self.probe is not None and self.steps:
            rows = tuple(tuple(map(tuple, row)) for row in self.log_probs)
            probed = Probed(tuple(self.steps), rows, self._texts(self.probe), self.probe)
        return Report(self._verdicts[0], self.alarm, self.stopped, probed, self._verdicts[1])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        names = ("alarm", "stopped", "streak", "judged", "steps", "log_probs")
        arguments = {
            "beta": self.beta,
            "probe": None if self.probe is None else self.probe.to_dict(),
            "every": self.every,
            "patience": self.patience,
            "stop": self.stop,
            "threshold": self.threshold,
        }
        return {"args": arguments, "attributes": {name: getattr(self, name) for name in names}}

    def _restore(self, saved: Any) -> None:
        """From a checkpoint, if it is of a callback with this probe."""
        probe = None if self.probe is None else self.probe.to_dict()
        for found in saved if isinstance(saved, list) else [saved] if saved else []:
            if found["args"]["probe"] == probe:
                for name, value in found["attributes"].items():
                    setattr(self, name, value)
                self.stopped = False  # who resumes wants to go on
                return

    def _measure(self, step: int, network: Any) -> None:
        """Every process measures, as a sharded network needs it, and all take the first one's numbers."""
        if self.probe is None or network is None or step in self.steps:
            return
        found: list[Any] = [self.probe.log_probs(network)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(found, src=0)
        self.steps.append(step)
        self.log_probs.append(found[0])

    def _judge(self, history: list[dict[str, Any]]) -> list[Diagnosis | None]:
        """Verdicts on the log and on the probe, kept; those that are alarming, None for a log of nothing finite."""
        settings = {k: v for k, v in self._settings.items() if v is not None}
        self._verdicts = [_verdict(history, **settings), _verdict(self._entries())]
        alarming = [d for d in self._verdicts if d is not None and d.verdict in ALARMING and _fell(d, self.threshold)]
        return [*alarming] or ([None] if self._verdicts[0] is None and _broken(history) else [])

    def _entries(self) -> list[dict[str, float]]:
        """The probe as a log of evaluations."""
        probed = self.report.probe
        if probed is None:
            return []
        rows = zip(probed.steps, probed.mean(0), probed.mean(1), strict=True)
        return [{"step": s, "eval_logps/chosen": x, "eval_logps/rejected": y} for s, x, y in rows]

    def _metrics(self) -> dict[str, float]:
        """What goes into the trainer's log."""
        out = {"displacement/alarm": float(self.alarm is not None)}
        found = self._verdicts[0]
        if found is not None and found.scale.nats:
            for name in ("chosen", "rejected", "margin"):
                if (change := getattr(found.finding, name)) is not None:
                    out[f"displacement/{name}_change"] = change.end
        if (probed := self.report.probe) is not None:
            out |= {
                "displacement/probe_chosen": probed.change(0)[-1],
                "displacement/probe_rejected": probed.change(1)[-1],
            }
            out["displacement/probe_held"] = probed.held[-1]
        return out

    def _said(self, found: Diagnosis | None) -> str:
        why = "the logged rewards are not finite" if found is None else found.sentence
        where = "on the probe, " if found is not None and found is self._verdicts[1] else ""
        then = "The training stops." if self.stop else "The training goes on; stop=True would end it."
        return f"{where}{why}. {then} More: print(callback.report)"

    def _texts(self, probe: Probe) -> tuple[tuple[str, ...], ...]:
        if self._tokenizer is None:
            text = str
        else:
            text = LanguageModel(None, self._tokenizer).text
        return tuple((text(p.prompt), *map(text, own)) for p, own in zip(probe.pairs, probe.responses, strict=True))


def _measured(entry: Mapping[str, Any]) -> list[Any]:
    """The rewards and log-probabilities of the chosen responses in a log entry."""
    return [x for key, x in entry.items() if (name := canonical(str(key))) is not None and name[1] in MEASURED]


def _broken(history: list[dict[str, Any]]) -> bool:
    """Whether there are such numbers, and none is finite."""
    found = [x for entry in history for x in _measured(entry)]
    return bool(found) and not any(map(math.isfinite, found))


def _verdict(entries: list[dict[str, Any]], **settings: Any) -> Diagnosis | None:
    """None where nothing of a preference loss is in it, or nothing finite."""
    try:
        return diagnose(Log.of(entries, kind="running", settings=settings))
    except ValueError:
        return None


def _fell(found: Diagnosis, nats: float) -> bool:
    """By so much, or to what is no number."""
    change = found.finding.chosen
    return change is None or change.end < -found.scale.limit(nats)


def _last(found: Diagnosis | None, step: int) -> float:
    """The last step of what a verdict rests on."""
    change = found and found.finding.chosen
    return change.steps[-1] if change else step
