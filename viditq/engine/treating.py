"""What treatments do to each part of a denoiser, as a Lightning `predict` loop over parts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from viditq.engine.sampling import PipelineModule
from viditq.errors import UserError
from viditq.models.generate import denoise
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.search.allotment import Part, anchor_of, treated_plan
from viditq.quant.search.part_errors import PartErrors, explored
from viditq.quant.search.sensitivity import Swapper
from viditq.quant.search.some_steps import SomeSteps
from viditq.quant.search.treatments import Treatment


@dataclass(frozen=True)
class Found:
    """Of one part: errors of its own outputs, and the error of the denoiser's output under the treatment `anchor`."""

    errors: Mapping[Treatment, float]
    anchor: Treatment
    output: float

    @property
    def costs(self) -> dict[Treatment, float]:
        """Error of the denoiser's output under each treatment: the anchor's, times the ratio of the part's errors."""
        own = self.errors[self.anchor]
        return {treatment: self.output * (error / own if own else 1.0) for treatment, error in self.errors.items()}


class Treating(PipelineModule):
    """Hands what is found of each part to `sink(part, found)`; batches are positions in `parts`.

    prompts: (position of a prompt, index of its noise), which the float model samples once; not of the calibration.
    """

    def __init__(
        self,
        *args: Any,
        parts: Sequence[Part],
        prompts: Sequence[tuple[int, int]],
        num_steps: int,
        edges: Sequence[float],
        stats: CalibrationStats,
        backend: str,
        sink: Callable[[Part, Found], None],
    ) -> None:
        super().__init__(*args)
        self.parts_of_plan, self.prompts, self.edges = parts, prompts, edges
        self.stats, self.sink = stats, sink
        self.denoiser = self.adapter.denoiser_of(self.pipeline)
        self.swapper = Swapper(self.denoiser, edges, stats, self.adapter.timestep_scale, backend)
        layers = [layer for part in parts for layer in part.group.layers]
        self.steps = SomeSteps(self.swapper, num_steps, layers)
        self.recorded = False

    def predict_step(self, position: int, batch_idx: int) -> None:
        """One part."""
        if not self.recorded:
            with self.steps.recording():
                embeds = [self.load_embeds(prompt) for prompt, _ in self.prompts]
                denoise(self.adapter, self.pipeline, embeds, [index for _, index in self.prompts], self.seed)
            self.recorded = True
        part = self.parts_of_plan[position]
        rows = {layer: self.steps.rows(layer) for layer in part.group.layers}
        if idle := [layer for layer, of in rows.items() if not of]:
            raise UserError(
                f"{idle[0]} never ran in {len(self.prompts)} prompts, so there is nothing to measure of it: leave it "
                "in float by a rule (quant.rules), or sample with more steps."
            )
        of_part = PartErrors(self.denoiser, rows, self.edges, self.stats, part.symmetric)
        errors = explored(part.menu, of_part.error, part.stored_bytes)
        anchor = anchor_of(errors)
        output = self.steps.error(treated_plan(self.edges, [part], {part.name: anchor}))
        self.sink(part, Found(errors, anchor, output))

    def on_predict_end(self) -> None:
        """The denoiser is as it was."""
        self.swapper.close()
