"""Every adapter method by name, with its options, as a table; imports no torch: a wrong option is refused at once.

A method of PEFT is an entry of `METHODS`: the name of its configuration, and the options that are offered, by the
fields that they set. What differs from PEFT's own way is a class, ``module:Class`` in the entry; see `methods.adapter`.
Formulas: W is (m, n), out × in; r is the rank; s the scale; what is trained stands in the entry.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from methods.options import Method, Option, alpha, dropout, lr_ratio, rank

LORA = (rank(4), alpha(), dropout(), lr_ratio())
LORA_START = "B = 0"
OUTER_BASIS = Option(
    "basis",
    "iterated",
    "How the SVD is computed: seeded subspace iteration, or exactly.",
    "basis",
    choices=("iterated", "exact"),
)
GENERATOR_SEED = Option("seed", 0, "Seed of the bases.", "generator_seed", at_least=0)
PEFT = "PEFT's own"
SEED = Option("seed", 0, "Seed of the frozen projections.", "projection_prng_key", at_least=0)
DENSE = "its update is of full rank, so that a LoRA file holds it only approximately (--convert_to_lora)"
NOT_ADDITIVE = "it changes W itself rather than adding to it, and a LoRA file holds the change only approximately"

_METHODS = (
    Method(
        "nora",
        "NoRA",
        "arXiv 2408.10280",
        "W + s B B' A' A; A, B frozen, from an activation-aware SVD of W",
        "nora:NoraConfig",
        (
            Option(
                "preset",
                "default",
                "Ranks and inner init of the three presets.",
                None,
                "preset",
                choices=("default", "paper", "tiny"),
            ),
            Option("rank", None, "Rank of the update, r'.", "r", "rank", int, at_least=1, shown="the preset's"),
            Option(
                "outer_rank",
                None,
                "Outer rank, r.",
                "outer_r",
                "outer_rank",
                int,
                at_least=1,
                shown="8 x rank, or what a layer can hold",
            ),
            alpha("nora_alpha"),
            dropout("nora_dropout"),
            lr_ratio(),
            Option(
                "outer_init",
                "awsvd",
                "The frozen factors.",
                "outer_init",
                "outer_init",
                choices=("awsvd", "svd", "random"),
            ),
            Option(
                "awsvd_gamma",
                0.5,
                "Exponent of the activations in AwSVD.",
                "awsvd_gamma",
                "awsvd_gamma",
                at_least=0,
                at_most=4,
            ),
            Option(
                "sigma_side",
                "B",
                "Where the singular values go.",
                "sigma_side",
                "sigma_side",
                choices=("B", "A", "both"),
            ),
            Option(
                "basis",
                "iterated",
                "How the SVD is computed: seeded subspace iteration, or exactly, as published.",
                "basis",
                choices=("iterated", "exact"),
                before="exact",
            ),
            Option(
                "inner_init",
                None,
                "The trained factors.",
                "inner_init",
                "inner_init",
                str,
                choices=("matched", "normal", "zero_uniform", "diag"),
                shown="the preset's",
            ),
            Option("inner_std", 0.01, "Standard deviation of inner_init=normal.", "inner_std", "inner_std", above=0),
            Option(
                "statistic",
                "base",
                "What AwSVD's statistic is measured on: pictures that the base draws by itself, once for all its "
                "subjects, or the run's own.",
                None,
                choices=("base", "subject"),
                before="subject",
            ),
            Option(
                "calibration_passes",
                32,
                "UNet forward passes of 4 samples that measure statistic=subject.",
                None,
                "calibration_passes",
                at_least=1,
            ),
            Option(
                "structure",
                "serial",
                "Where the trained matrices sit (docs/design-space.md): serial is NoRA.",
                "structure",
                choices=("serial", "adapter", "parallel"),
            ),
            Option(
                "position",
                "a",
                "The slot: a, between A and B; b, behind B; both, serial only.",
                "position",
                choices=("a", "b", "ab"),
            ),
            Option(
                "outer_part",
                "top",
                "Which singular directions the frozen factors take.",
                "outer_part",
                choices=("top", "middle", "last"),
            ),
            Option(
                "residual",
                None,
                "Take the start off the update, so that it starts at the base.",
                "residual",
                kind=bool,
                shown="for inner_init=diag",
            ),
            Option(
                "scaling",
                "alpha/r",
                "The rule of the scale.",
                "scaling",
                choices=("alpha/r", "alpha/sqrt(r)"),
            ),
            Option(
                "generator",
                "dense",
                "Train the matrices themselves, or NOLA's coefficients of them.",
                "generator",
                choices=("dense", "nola"),
            ),
            Option("coefficients", 512, "Of each matrix with generator=nola.", "coefficients", at_least=1),
        ),
        "B' = 0; inner_init=normal, as published, starts a little beside it",
        adapter="methods.nora:Nora",
        ranks_by_layer=True,
    ),
    Method(
        "lora-xs",
        "LoRA-XS",
        "arXiv 2405.17604",
        "W + s B R A, R trained (r × r); B, A = U, Σ Vᵀ frozen, from the SVD of W",
        "nora:NoraConfig",
        (
            rank(64),
            alpha("nora_alpha"),
            dropout("nora_dropout"),
            Option(
                "sigma_side",
                "A",
                "Where the singular values go; A as in its authors' code.",
                "sigma_side",
                choices=("B", "A", "both"),
            ),
            OUTER_BASIS,
        ),
        "R = 0; as published, N(0, 1e-5²), it would start 4e-5 beside it",
        fixed={"structure": "adapter", "outer_init": "svd", "inner_init": "matched"},
        adapter="methods.nora:Nora",
        rates="1e-3 to 4e-3",
    ),
    Method(
        "nola",
        "NOLA",
        "arXiv 2310.02556",
        "W + s B A; A = A₀ + Σ α_i A_i, B = Σ β_i B_i over seeded random bases, α and β trained",
        "nora:NoraConfig",
        (
            rank(8),
            alpha("nora_alpha"),
            dropout("nora_dropout"),
            Option("coefficients", 512, "Of A, and of B.", "coefficients", at_least=1),
            GENERATOR_SEED,
        ),
        "α = β = 0",
        fixed={"structure": "plain", "generator": "nola", "inner_init": "zero_uniform"},
        adapter="methods.nora:Nora",
        rates="1e-3 to 5e-3",
        vectors=True,
    ),
    Method(
        "nola-nora",
        "NOLA-NoRA",
        "arXiv 2310.02556 in 2408.10280",
        "W + s B B' A' A; A' and B' as NOLA makes them, from coefficients",
        "nora:NoraConfig",
        (
            rank(16),
            Option("outer_rank", None, "Outer rank, r.", "outer_r", "outer_rank", int, at_least=1, shown="8 x rank"),
            alpha("nora_alpha"),
            dropout("nora_dropout"),
            Option("coefficients", 128, "Of A', and of B'.", "coefficients", at_least=1),
            GENERATOR_SEED,
            OUTER_BASIS,
        ),
        "the coefficients are 0",
        fixed={"generator": "nola", "outer_init": "svd"},
        adapter="methods.nora:Nora",
        rates="1e-3 to 5e-3",
        vectors=True,
    ),
    Method(
        "lora",
        "LoRA",
        "arXiv 2106.09685",
        "W + s B A",
        "LoraConfig",
        LORA,
        LORA_START,
        fixed={"init_lora_weights": "gaussian"},
        ranks_by_layer=True,
    ),
    Method(
        "dora",
        "DoRA",
        "arXiv 2402.09353",
        "magnitude · (W + s B A) / ‖W + s B A‖, by output row",
        "LoraConfig",
        LORA,
        "B = 0, magnitude = ‖W‖",
        fixed={"init_lora_weights": "gaussian", "use_dora": True},
        low_rank=False,
        limits=("its LoRA file, with magnitudes, is read by diffusers for the UNet",),
        no_text_encoders="makes a file that diffusers reads without the text encoders' magnitudes",
        not_decayed=("lora_magnitude_vector",),
        vectors=True,
        ranks_by_layer=True,
    ),
    Method(
        "rslora",
        "rsLoRA",
        "arXiv 2312.03732",
        "W + alpha / √r B A",
        "LoraConfig",
        (rank(4), alpha(scale="alpha / √rank"), dropout(), lr_ratio()),
        LORA_START,
        fixed={"init_lora_weights": "gaussian", "use_rslora": True},
        rates="LoRA's / √rank",
        ranks_by_layer=True,
    ),
    Method(
        "pissa",
        "PiSSA",
        "arXiv 2404.02948",
        "W + s (B A − B₀ A₀); A₀, B₀ the leading singular vectors of W, where A and B start",
        "LoraConfig",
        (rank(4), alpha(), dropout(), lr_ratio()),
        "A₀ and B₀ stay beside A and B, and W as it is",
        fixed={"init_lora_weights": "pissa"},
        adapter="methods.factors:Started",
        rates="2e-5",
        limits=("its LoRA file has twice the rank, because it holds where the run started",),
        not_decayed=("lora_",),
    ),
    Method(
        "olora",
        "OLoRA",
        "arXiv 2406.01775",
        "W + s (B A − B₀ A₀); B₀ A₀ the first columns of W's QR decomposition, where A and B start",
        "LoraConfig",
        (rank(4), alpha(), dropout(), lr_ratio()),
        "A₀ and B₀ stay beside A and B, and W as it is",
        fixed={"init_lora_weights": "olora"},
        adapter="methods.factors:Started",
        rates="2e-5",
        limits=("its LoRA file has twice the rank, because it holds where the run started",),
        not_decayed=("lora_",),
    ),
    Method(
        "vera",
        "VeRA",
        "arXiv 2310.11454",
        "W + diag(λ_b) B diag(λ_d) A; A and B random, frozen and shared by all layers",
        "VeraConfig",
        (
            rank(256),
            dropout("vera_dropout"),
            SEED,
            Option("d_initial", 0.1, "Start of λ_d.", "d_initial", above=0),
        ),
        "λ_b = 0",
        low_rank=False,
        rates="1e-3 to 1e-2",
        limits=("its rank is large, and a LoRA file of that rank is larger than a dense one would be",),
        not_decayed=("vera_lambda_d",),
        vectors=True,
    ),
    Method(
        "adalora",
        "AdaLoRA",
        "arXiv 2303.10512",
        "W + alpha / r₀ B diag(E) A; the rank of each layer is allocated while it trains",
        "AdaLoraConfig",
        (
            Option("init_rank", 12, "Rank of each layer at the start, r₀.", "init_r", "rank", at_least=1),
            Option("target_rank", 8, "Mean rank of a layer at the end.", "target_r", at_least=1),
            alpha(scale="alpha / init_rank", shown="init_rank"),
            dropout(),
            Option("tinit", 0, "Steps before the budget falls.", "tinit", at_least=0),
            Option("tfinal", 0, "Last steps, at the final budget.", "tfinal", at_least=0),
            Option("interval", 1, "Steps between two allocations.", "deltaT", at_least=1),
            Option("beta1", 0.85, "Smoothing of the importance.", "beta1", above=0, below=1),
            Option("beta2", 0.85, "Smoothing of its uncertainty.", "beta2", above=0, below=1),
            Option("orth_weight", 0.5, "Weight of the penalty ‖A Aᵀ − I‖, ‖Bᵀ B − I‖.", "orth_reg_weight", at_least=0),
        ),
        "E = 0",
        adapter="methods.adalora:AdaLora",
        plans_ahead=True,
    ),
    Method(
        "lokr",
        "LoKr",
        "arXiv 2309.14859",
        "W + s w₁ ⊗ w₂, a Kronecker product; w₂ of low rank where that is smaller",
        "LoKrConfig",
        (
            rank(8, help="Rank of w₂."),
            alpha("alpha"),
            dropout("rank_dropout", "on the rank"),
            Option("factor", -1, "Size of w₁; -1: as square as the layer allows.", "decompose_factor", at_least=-1),
            Option("decompose_both", False, "w₁ of low rank, too.", "decompose_both"),
        ),
        "w₁ = 0",
        low_rank=False,
        rates="1e-3",
        limits=(DENSE,),
        ranks_by_layer=True,
    ),
    Method(
        "loha",
        "LoHa",
        "arXiv 2108.06098",
        "W + s (B₁ A₁) ∘ (B₂ A₂), a product by element",
        "LoHaConfig",
        (rank(4), alpha("alpha"), dropout("rank_dropout", "on the rank")),
        "B₂ = 0",
        low_rank=False,
        rates="1e-4",
        limits=("its update's rank may be rank², so that a LoRA file holds it only approximately (--convert_to_lora)",),
        ranks_by_layer=True,
    ),
    Method(
        "randlora",
        "RandLoRA",
        "arXiv 2502.00987",
        "W + s Σ_j B_j diag(λ_j) A diag(γ_j); A and B_j random, frozen and shared by all layers",
        "RandLoraConfig",
        (
            rank(32, help="Rank of each random pair; a smaller one trains more."),
            Option(
                "alpha",
                None,
                "The scale is alpha / rank.",
                "randlora_alpha",
                "lora_alpha",
                float,
                above=0,
                shown="20 x rank",
            ),
            dropout("randlora_dropout"),
            SEED,
        ),
        "λ = 0",
        adapter="methods.adapter:RandLora",
        low_rank=False,
        rates="1e-5 to 5e-5",
        limits=(DENSE,),
        not_decayed=("randlora_gamma",),
    ),
    Method(
        "oft",
        "OFT",
        "arXiv 2306.07280 (OFTv2: 2506.19847)",
        "W R, R a rotation of blocks of the input",
        "OFTConfig",
        (
            Option("block_size", 32, "Side of a block; it must divide a layer's inputs.", "oft_block_size", at_least=2),
            dropout("module_dropout", "of whole blocks"),
            Option("neumann", True, "R by five terms of a series, not by a solve.", "use_cayley_neumann"),
            Option("block_share", False, "One rotation for all blocks of a layer.", "block_share"),
        ),
        "R = I",
        adapter="methods.adapter:Oft",
        low_rank=False,
        rates="1e-4",
        limits=(NOT_ADDITIVE + " (--convert_to_lora)",),
    ),
    Method(
        "hra",
        "HRA",
        "arXiv 2405.17484",
        "W Π (I − 2 u uᵀ / ‖u‖²), a chain of r Householder reflections",
        "HRAConfig",
        (rank(8, help="Reflections; even, so that pairs undo each other at the start."),),
        "equal pairs of reflections",
        adapter="methods.adapter:Hra",
        low_rank=False,
        rates="1e-4 to 5e-3",
        limits=(NOT_ADDITIVE + " (--convert_to_lora)", "the orthogonality penalty of its paper is not in PEFT"),
        not_decayed=("hra_u",),
    ),
    Method(
        "fourierft",
        "FourierFT",
        "arXiv 2405.03003",
        "W + scaling · Re(ifft2(F)), F with n trained entries at random places",
        "FourierFTConfig",
        (
            Option("n_frequency", 1000, "Trained entries of each layer.", "n_frequency", at_least=1),
            Option("scaling", 150.0, "Scale of the update.", "scaling", above=0),
            Option("seed", 777, "Seed of the places.", "random_loc_seed", at_least=0),
        ),
        "F = 0; PEFT's default draws it and starts elsewhere",
        fixed={"init_weights": True},
        adapter="methods.adapter:FourierFt",
        low_rank=False,
        vectors=True,
        rates="1e-2 to 1e-1",
        limits=(DENSE,),
    ),
    Method(
        "mica",
        "MiCA",
        "arXiv 2604.01694",
        "W + s B A; B frozen, the last left singular vectors of W",
        "LoraConfig",
        (rank(4), alpha(), dropout()),
        "A = 0",
        fixed={"init_lora_weights": "mica"},
        rates="1e-4 to 1e-3",
        ranks_by_layer=True,
    ),
    Method(
        "lora-fa",
        "LoRA-FA",
        "arXiv 2308.03303",
        "W + s B A; A random and frozen, the gradient of B times (A Aᵀ)⁻¹ / s²",
        "LoraConfig",
        (rank(4), alpha(), dropout()),
        LORA_START,
        fixed={"init_lora_weights": "gaussian"},
        adapter="methods.lora_fa:LoraFa",
        rates="1e-4 to 4e-4",
        ranks_by_layer=True,
    ),
    Method(
        "loraplus",
        "LoRA+",
        "arXiv 2402.12354",
        "W + s B A; B learns lr_ratio times as fast as A",
        "LoraConfig",
        (rank(4), alpha(), dropout(), lr_ratio(16.0)),
        LORA_START,
        fixed={"init_lora_weights": "gaussian"},
        rates="half of LoRA's",
        ranks_by_layer=True,
    ),
    Method(
        "moslora",
        "MoSLoRA",
        "arXiv 2406.11909",
        "W + s B M A, with a trained r × r mixer M; for linear layers FLoRA's core (arXiv 2405.14739) is the same",
        "LoraConfig",
        (
            *LORA,
            Option(
                "mixer_init",
                "kaiming",
                "Start of M: as published, or neutral.",
                None,
                choices=("kaiming", "orthogonal"),
            ),
        ),
        LORA_START,
        fixed={"init_lora_weights": "gaussian"},
        adapter="methods.factors:MoSLora",
    ),
    Method(
        "dylora",
        "DyLoRA",
        "arXiv 2210.07558",
        "W + alpha / q B_q A_q, the first q of r components; q is drawn anew each step",
        "LoraConfig",
        (
            *LORA,
            Option("frozen", True, "A step trains component q alone, not the ones before it.", None),
            Option("save_rank", None, "Components that the files hold.", None, None, int, at_least=1, shown="all"),
        ),
        LORA_START,
        fixed={"init_lora_weights": "gaussian"},
        adapter="methods.factors:DyLora",
    ),
)
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}

# (outer rank, rank, inner init) of method.md's presets; an outer rank of None is 8 x rank, or what a layer can hold.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"rank": 16, "outer_rank": None, "inner_init": "matched"},
    "paper": {"rank": 32, "outer_rank": 64, "inner_init": "normal"},
    "tiny": {"rank": 8, "outer_rank": None, "inner_init": "matched"},
}


def find_method(name: str) -> Method:
    """The method of that name, in upper or lower case.

    Raises:
        ValueError: listing those that there are.
    """
    if (found := METHODS.get(name.lower())) is not None:
        return found
    near = difflib.get_close_matches(name.lower(), METHODS, 1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"--method {name} is not known{meant}: choose one of {', '.join(METHODS)}")


def resolve(name: str, arguments: Sequence[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a method with its value, from ``--method_args`` and from the flags that say the same.

    Args:
        arguments: ``key=value`` each.
        flags: the trainer's flags that are options of methods; None where a flag is not given.

    Raises:
        ValueError: for an option that the method doesn't have, with those it has; one given twice; a wrong value.
    """
    method = find_method(name)
    given: dict[str, Any] = {}
    for flag, value in flags.items():
        option = method.flagged(flag)
        if value is None:
            continue
        if option is None:
            others = " and ".join(one.title for one in METHODS.values() if one.flagged(flag))
            raise ValueError(
                f"--{flag} {value} is an option of {others}: leave it out with --method {method.name}, which has "
                f"{method.option_names}"
            )
        option.check(value, f"--{flag} {value}")
        given[option.name] = option.type(value)
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise ValueError(f"--method_args {argument} must look like rank=8; --method_args help lists the options")
        option = method.option(key)
        if option is None:
            raise ValueError(f"--method_args {argument}: --method {method.name} has {method.option_names}")
        value = option.parse(text, f"--method_args {argument}")
        if given.get(key, value) != value:
            raise ValueError(f"--method_args {argument}: {key} is given twice, as {given[key]} too: leave one out")
        given[key] = value
    return _CHECKS.get(method.name, _complete)(method, given)


def _complete(method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    return {option.name: given.get(option.name, option.default) for option in method.options}


def _nora(method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in given.items() if value is not None}
    if "calibration_passes" in given:
        given = {"statistic": "subject", **given}
    values = _complete(method, PRESETS[given.get("preset", "default")] | given)
    defaults = {option.name: option.default for option in method.options}
    for name, needed in (
        ("awsvd_gamma", ("outer_init", "awsvd")),
        ("statistic", ("outer_init", "awsvd")),
        ("inner_std", ("inner_init", "normal")),
    ):
        if given.get(name, defaults[name]) != defaults[name] and values[needed[0]] != needed[1]:
            raise ValueError(
                f"--{name} {given[name]} has no effect with {values[needed[0]]}: add --{needed[0]} {needed[1]} or "
                "leave it out"
            )
    if values["outer_rank"] is not None and values["rank"] > values["outer_rank"]:
        raise ValueError(
            f"--rank {values['rank']} exceeds --outer_rank {values['outer_rank']}: the update lives between the outer "
            "factors, so lower the one or raise the other"
        )
    return values


def _adalora(method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    values = _complete(method, given)
    if values["target_rank"] >= values["init_rank"]:
        raise ValueError(
            f"target_rank={values['target_rank']} must be below init_rank={values['init_rank']}: AdaLoRA takes rank "
            "away, so raise --method_args init_rank or lower target_rank"
        )
    return values


def _hra(method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    values = _complete(method, given)
    if values["rank"] % 2:
        raise ValueError(f"rank={values['rank']} must be even: an odd number of reflections does not start at the base")
    return values


def _dylora(method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    values = _complete(method, given)
    if values["save_rank"] is not None and values["save_rank"] > values["rank"]:
        raise ValueError(f"save_rank={values['save_rank']} exceeds rank={values['rank']}, which is trained: lower it")
    return values


_CHECKS = {"nora": _nora, "adalora": _adalora, "hra": _hra, "dylora": _dylora}
