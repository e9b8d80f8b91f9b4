"""What a resumed run does first: a validation that its checkpoint still owes."""

from __future__ import annotations

from typing import cast

import lightning
from lightning.pytorch.loops.fit_loop import _FitLoop


class ResumingFitLoop(_FitLoop):
    """Lightning's loop, which takes a due validation for done when it resumes.

    A checkpoint that was written at a step whose validation had not ended, or not begun, is resumed
    by that validation, and be it all that the run has left to do.
    """

    #: The step of the last validation that was finished; None: of none. Set by `Checkpoints`.
    validated: int | None = None

    @classmethod
    def take_over(cls, trainer: lightning.Trainer) -> ResumingFitLoop:
        """Make a trainer's loop this one; Lightning has no argument for it."""
        trainer.fit_loop.__class__ = cls
        return cast(ResumingFitLoop, trainer.fit_loop)

    @property
    def owes(self) -> bool:
        """Whether the validation of the step that was resumed at is still to be done."""
        step, loop = self.trainer.global_step, self.epoch_loop
        return (
            self.is_resuming
            and step > 0
            and step != self.validated
            and self._data_fetcher is not None
            and not loop._should_accumulate()  # such a validation comes again by itself
            and loop._should_check_val_fx(self._data_fetcher)
        )

    @property
    def skip(self) -> bool:
        return super().skip and not self.owes

    def on_run_start(self) -> None:
        super().on_run_start()
        if not self.owes:
            return
        trainer, loop = self.trainer, self.epoch_loop.val_loop
        first = trainer._logger_connector._first_loop_iter
        loop.restarting = False  # it begins anew
        trainer.validating = True
        loop.run()
        # At an epoch's end Lightning would take the epoch for done without entering its loop, which
        # is where it notes that nothing is resumed any more: so would be all epochs that follow.
        loop._has_run = False
        trainer.training = True
        trainer._logger_connector._first_loop_iter = first
