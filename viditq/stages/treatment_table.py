"""The table of a search of treatments on disk: what is known of each part and of whole plans, and its making."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from viditq.engine.probing import OUTPUT, Probe, Probing, Scores
from viditq.engine.sampling import CALIBRATION_OFFSET, batches_of, run_batches
from viditq.engine.treating import Found, Treating
from viditq.files import is_whole, read_json, write_json
from viditq.job import Job
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.description.plan import QuantPlan
from viditq.quant.search.allotment import Part
from viditq.quant.search.treatment_policy import TreatmentSearch
from viditq.quant.search.treatments import Treatment
from viditq.run_dir import Entry, fingerprint

EXPLORED = 2  # how treatments are explored; what was found otherwise is found anew


class TreatmentTable:
    """What is not known yet is made by all processes together; a killed search goes on with the next part or plan."""

    def __init__(self, job: Job, policy: TreatmentSearch, parts: Sequence[Part]) -> None:
        self.job, self.policy, self.parts = job, policy, parts
        e = job.experiment
        self.edges = e.plan.edges
        self.stats = CalibrationStats.load(job.stats_file)
        self.prompts, self.noise = e.held_out_prompts, CALIBRATION_OFFSET + len(e.observed_prompts)
        key = {"stats": job.stats.path.name, "seed": e.seed, "edges": self.edges, "prompts": self.prompts}
        looks = {"num_steps": policy.num_steps, "step_prompts": policy.step_prompts, "symmetric": policy.symmetric}
        menu = {f.name: getattr(policy.menu, f.name) for f in fields(policy.menu)}
        layers = {part.name: part.group.layers for part in parts}
        self.found_entry = Entry(
            e.cache_dir / "treatments", {**key, **looks, "menu": menu, "parts": layers, "explored": EXPLORED}
        )
        self.plan_entry = Entry(e.cache_dir / "treated_plans", {**key, "batch_size": e.adapter.calibration_batch_size})

    def found(self) -> dict[str, Found]:
        """Of every part."""
        files = {part.name: self.found_entry.path / f"{part.name.replace('/', '-')}.json" for part in self.parts}
        with self.job.holding(self.found_entry):
            missing = self.job.processes.first_does(lambda: [n for n, file in files.items() if not is_whole(file)])
            if missing:
                self._find([part for part in self.parts if part.name in missing], files)
        return {name: _read(file) for name, file in files.items()}

    def output_errors(self, plans: Sequence[QuantPlan]) -> list[list[float]]:
        """Of each whole plan, the mean square error of every prompt's pixels."""
        files = [self.plan_entry.path / f"plan-{fingerprint({'plan': plan.to_json()})}.json" for plan in plans]
        with self.job.holding(self.plan_entry):
            absent = self.job.processes.first_does(lambda: [i for i, f in enumerate(files) if not is_whole(f)])
            if absent:
                self._generate([_probe(plans[i], files[i]) for i in absent])
        return [read_json(file)["scores"][OUTPUT] for file in files]

    def _find(self, parts: Sequence[Part], files: Mapping[str, Path]) -> None:
        job, e = self.job, self.job.experiment

        def sink(part: Part, found: Found) -> None:
            write_json(files[part.name], _written(found))
            job.say(f"      {part.name}: {len(found.errors)} treatments")

        module = Treating(
            *(e.adapter, job.load_float(), job.load_embeds(self.prompts), e.seed),
            parts=parts,
            prompts=[(i, self.noise + i) for i in range(min(self.policy.step_prompts, len(self.prompts)))],
            num_steps=self.policy.num_steps,
            edges=self.edges,
            stats=self.stats,
            backend="fake",
            sink=sink,
        )
        run_batches(e.make_trainer(), module, job.processes.share([*range(len(parts))]))
        job.processes.wait()

    def _generate(self, probes: Sequence[Probe]) -> None:
        job, e = self.job, self.job.experiment
        module = Probing(
            *(e.adapter, job.load_float(), job.load_embeds(self.prompts), e.seed),
            prompts=self.prompts,
            noise_indices=[self.noise + i for i in range(len(self.prompts))],
            batches=batches_of(len(self.prompts), e.adapter.calibration_batch_size),
            metrics={},
            base=e.plan,
            stats=self.stats,
            backend="fake",
        )
        run_batches(e.make_trainer(), module, job.processes.share(probes))
        job.processes.wait()


def _probe(plan: QuantPlan, file: Path) -> Probe:
    def sink(scores: Scores) -> None:
        write_json(file, {"scores": scores})

    return Probe(lambda: plan, 1.0, [], sink)


def _written(found: Found) -> dict[str, object]:
    errors = [[asdict(treatment), error] for treatment, error in found.errors.items()]
    return {"errors": errors, "anchor": asdict(found.anchor), "output": found.output}


def _read(file: Path) -> Found:
    values = read_json(file)
    errors = {Treatment(**treatment): error for treatment, error in values["errors"]}
    return Found(errors, Treatment(**values["anchor"]), values["output"])
