"""Measures what each group of linears loses at the recipe's bits and at 8, alone, in some consecutive blocks."""

import logging
from dataclasses import dataclass, replace

import torch
from quad_kernels import InputQuantization
from tqdm import tqdm

from quad_modifiers.checkpoint.format import LinearFormat, OutlierBlockFormat, WeightFormat
from quad_modifiers.checkpoint.opened import Opened
from quad_modifiers.checkpoint.tensors import linear_tensors
from quad_modifiers.model.decoder import Decoder, PlacedLinear
from quad_modifiers.tools.inspection.evaluation_text import Text, TextOptions
from quad_modifiers.tools.inspection.measure.loss import tried
from quad_modifiers.tools.inspection.measure.trials import Trial, slice_name, slices
from quad_modifiers.tools.inspection.measure.watch import INPUT_GRIDS
from quad_modifiers.tools.inspection.measure.weights import RoundedWeights
from quad_modifiers.tools.inspection.measuring import project
from quad_modifiers.tools.suggestion.base_recipe import BaseRecipe
from quad_modifiers.tools.suggestion.later_blocks import LaterBlocks
from quad_modifiers.tools.suggestion.sensitivities import WIDE, Kind, Part, Sensitivities

logger = logging.getLogger(__name__)

_Costed = list[tuple[Part, list[PlacedLinear]]]


@dataclass
class ProjectedModel:
    """A model, projected by a recipe, in whose parts bits are tried.

    Attributes:
        name: of the model.
        decoder: with the input quantization of the recipe set, and not switched on.
        recipe: what it was projected by.
        text: windows to measure on.
        sizes: weights of each linear in the original, by name.
        dtype: of scales and outlier columns in a checkpoint.
    """

    name: str
    decoder: Decoder
    recipe: BaseRecipe
    text: Text
    sizes: dict[str, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, opened: Opened, recipe: BaseRecipe, options: TextOptions) -> "ProjectedModel":
        """Loads and projects a model.

        It is computed in float32 unless its dtype was given: what 8 bits lose drowns in the rounding of bfloat16.

        Raises:
            ValueError: if the recipe does not fit the model, or there is not enough text.
        """
        text = options.windows(opened.tokenizer(), False, opened.config.vocab_size)
        model = opened.load()
        dtype = model.dtype
        if opened.options.dtype == "auto":
            model = model.float()
        decoder = Decoder(model, opened.architecture)
        sizes = {linear.name: linear.module.weight.numel() for linear in decoder.linears()}
        return cls(opened.name, _prepared(decoder, recipe, text.calibration), recipe, text, sizes, dtype)

    def costs(self, of_inputs: bool) -> Sensitivities:
        """Returns the parts with what their bits take, and no divergence yet; of inputs only if wanted."""
        bits, linears = self.recipe.weights.bits, list(self.decoder.linears())
        stored = [self._bits_of(linear, bits) for linear in linears]
        settings = self.text.settings
        return Sensitivities(
            model=self.name,
            model_type=self.decoder.architecture.model_type,
            layers=len(self.decoder.blocks),
            recipe=self.recipe.name,
            recipe_digest=self.recipe.digest,
            text=settings.text,
            windows=settings.measured_windows,
            window_length=settings.window_length,
            seed=settings.seed,
            weights=sum(self.sizes.values()),
            stored=sum(whole for whole, _ in stored),
            outliers=sum(outlier for _, outlier in stored),
            parts=tuple(part for part, _ in self._parts(of_inputs)),
        )

    def measured(self, costs: Sensitivities) -> Sensitivities:
        """Returns the parts of `costs` with their divergences."""
        logger.info("measuring each part of %s alone", self.name)
        found = []
        places = self._parts(bool(costs.of("inputs")))
        runs = LaterBlocks(self.decoder, self.text.measured, sorted({part.first for part, _ in places}))
        with tqdm(places, unit="part", leave=False, desc="sensitivities") as progress:
            for part, linears in progress:
                narrow, wide = (self._divergence(runs, part, linears, bits) for bits in (part.bits, WIDE))
                found.append(part.model_copy(update={"narrow": narrow, "wide": wide}))
        return costs.model_copy(update={"parts": tuple(found)})

    def _parts(self, of_inputs: bool) -> _Costed:
        linears = list(self.decoder.linears())
        weights = [linear for linear in linears if self.recipe.weights.bits_of(linear) is not None]
        inputs = [linear for linear in linears if of_inputs and self._input_of(linear) is not None]
        found: _Costed = []
        chosen_of: dict[Kind, list[PlacedLinear]] = {"weights": weights, "inputs": inputs}
        for kind, chosen in chosen_of.items():
            for span in slices(len(self.decoder.blocks)):
                inside = [linear for linear in chosen if span[0] <= linear.layer < span[1]]
                for group in dict.fromkeys(linear.group.name for linear in inside):
                    members = [linear for linear in inside if linear.group.name == group]
                    found.append((self._costed(kind, members, span), members))
        return found

    def _costed(self, kind: Kind, linears: list[PlacedLinear], span: tuple[int, int]) -> Part:
        bits, extra = self.recipe.weights.bits, 0
        if kind == "weights":
            extra = sum(self._bits_of(each, WIDE)[0] - self._bits_of(each, bits)[0] for each in linears)
        else:
            given = self._input_of(linears[0])
            assert given is not None
            bits = given.bits
        return Part(
            kind=kind,
            group=linears[0].group.name,
            roles=tuple(dict.fromkeys(linear.role for linear in linears)),
            first=span[0],
            last=span[1] - 1,
            bits=bits,
            weights=sum(self.sizes[linear.name] for linear in linears),
            extra=extra,
            narrow=0.0,
            wide=0.0,
        )

    def _divergence(self, runs: LaterBlocks, part: Part, linears: list[PlacedLinear], bits: int) -> float:
        modules, name = tuple(linear.module for linear in linears), slice_name(part.first, part.last + 1)
        trial, rounded = Trial(name, part.kind, str(bits), {}, modules), RoundedWeights(self.recipe.grid(bits))
        if part.kind == "inputs":
            given = self._input_of(linears[0])
            assert given is not None
            grid = given if bits == part.bits else replace(given, bits=bits, clip_ratio=1.0)
            trial = Trial(name, part.kind, str(bits), dict.fromkeys(modules, grid))
        with tried(trial, rounded):
            return runs.divergence(part.first)

    def _input_of(self, linear: PlacedLinear) -> InputQuantization | None:
        """The input quantization that the recipe gives a linear, where it may get more bits."""
        given: InputQuantization | None = linear.module.input_quantization
        if given is None or given.bits >= WIDE:
            return None
        inputs = self.recipe.inputs
        clip = inputs.d_type_clip_ratio if linear.group.writes_stream else inputs.u_type_clip_ratio
        return replace(given, clip_ratio=INPUT_GRIDS[4].clip_ratio) if clip == "auto" else given

    def _bits_of(self, linear: PlacedLinear, bits: int) -> tuple[int, int]:
        """Bits that a linear takes in the checkpoint but for its bias, and those of them of its outlier columns."""
        split, settings = linear.module.split, self.recipe.weights
        weight = WeightFormat(bits=bits, group_size=settings.group_size, symmetric=settings.symmetric)
        quantized = settings.bits_of(linear) is not None
        form = LinearFormat(
            outliers_per_block=split.outliers,
            block=split.block,
            keep_width=split.keep_width,
            hadamard=split.hadamard,
            in_features=split.width,
            out_features=linear.module.out_features,
            bias=False,
            weight=weight if quantized else None,
            input=None,
            outlier=OutlierBlockFormat() if quantized and split.outliers and settings.outlier_bits else None,
        )
        tensors = linear_tensors(form, self.dtype)
        sizes = {name: 8 * spec.dtype.itemsize * torch.Size(spec.shape).numel() for name, spec in tensors.items()}
        return sum(sizes.values()), sum(size for name, size in sizes.items() if name.startswith("outlier."))


def _prepared(decoder: Decoder, recipe: BaseRecipe, windows: list[torch.Tensor]) -> Decoder:
    from quad_modifiers.modifiers.base import prepared_decoder  # imports llm-compressor

    if recipe.projection is not None:
        recipe.projection.check(decoder)
    decoder = prepared_decoder(decoder.model)
    if recipe.projection is not None:
        logger.info("projecting by %s", recipe.name)
        project(decoder, recipe.projection, windows, recipe.rotations)
    if recipe.inputs is not None:
        recipe.inputs.prepare(decoder, lambda: [])
    return decoder
