"""Optimizers, learning rates by part, schedules and the moving average."""

import pytest
import torch
from torch import nn

from methods.adapter import make_adapter
from methods.registry import METHODS, resolve
from settings.learning import OptimizerOptions
from trainer.optimizer import (
    Average,
    build_optimizer,
    build_schedule,
    check_optimizer,
    check_rates,
    last_rate,
    parameter_groups,
    parse_optimizer_args,
    scaled_learning_rate,
)


def config(**options) -> OptimizerOptions:
    return OptimizerOptions(**options)


def checked(options: OptimizerOptions) -> list[str]:
    return list(check_optimizer(options))


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


MODELS = {"unet": Adapted(), "text_encoder": Adapted()}


CLASSES = [
    name
    for name, one in vars(torch.optim).items()
    if isinstance(one, type) and issubclass(one, torch.optim.Optimizer) and one is not torch.optim.Optimizer
]
UNFIT = {"LBFGS", "SparseAdam"}  # one needs a closure, the other sparse gradients


@pytest.mark.parametrize("name", [*sorted(set(CLASSES) - UNFIT), "adamw", "prodigy"])
def test_classes_by_name(name):
    one = config(optimizer=name, learning_rate=1.0 if name == "prodigy" else 1e-2)
    checked(one)  # which refuses one that fails
    parameter = nn.Parameter(torch.ones(3, 3))
    optimizer = build_optimizer(one, [{"params": [parameter]}])
    parameter.square().sum().backward()
    optimizer.step()
    assert (parameter != 1).all() and type(optimizer).__name__.lower() == name.lower()


@pytest.mark.parametrize(
    ("name", "words"), [("Lion", "is not known"), *((one, "can't train") for one in sorted(UNFIT))]
)
def test_classes_that_can_t_train_here_are_refused(name, words):
    with pytest.raises(ValueError, match=f"--optimizer {name} {words}"):
        checked(config(optimizer=name))


def test_flags_and_arguments_reach_the_class():
    parameter = [{"params": [nn.Parameter(torch.zeros(1))]}]
    adam = build_optimizer(config(adam_beta1=0.8, adam_epsilon=1e-5), parameter)
    assert adam.defaults["betas"] == (0.8, 0.999) and adam.defaults["eps"] == 1e-5
    sgd = build_optimizer(config(optimizer="SGD", optimizer_args=["momentum=0.7", "nesterov=True"]), parameter)
    assert sgd.defaults["momentum"] == 0.7 and sgd.defaults["nesterov"] is True
    prodigy = build_optimizer(config(optimizer="prodigy", prodigy_beta3=0.5, prodigy_decouple=False), parameter)
    assert prodigy.defaults["beta3"] == 0.5 and prodigy.defaults["decouple"] is False


def test_arguments_are_python_values():
    assert parse_optimizer_args(["a=1e-3", "b=(0.9, 0.99)", "c=None", "d=word"]) == {
        "a": 1e-3,
        "b": (0.9, 0.99),
        "c": None,
        "d": "word",
    }


def test_contradicting_arguments_are_refused():
    with pytest.raises(ValueError, match="--optimizer SGD refuses its arguments: Nesterov"):
        checked(config(optimizer="SGD", optimizer_args=["nesterov=True"]))


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("lr=5", "lr=5 would have no effect: use --learning_rate"),
        ("weight_decay=1", "use --adam_weight_decay"),
        ("eps=nan", "AdamW"),
        ("betas=0.9", "--optimizer AdamW refuses its arguments"),
        ("eps={[]: 1}", "--optimizer AdamW refuses its arguments"),
        ("capturable=True", "--optimizer AdamW fails with its --optimizer_args"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes capturable")
def test_arguments_that_don_t_work_are_refused(argument, words):
    with pytest.raises(ValueError, match=words):
        checked(config(optimizer_args=[argument]))


def test_what_decays_away_from_the_base_does_not_decay():
    """By the table of methods: a magnitude, a start that is not 0, what is beside the base."""
    for name, method in METHODS.items():
        adapter = make_adapter(name, resolve(name, [], {}))
        model = nn.Module()
        for part in ("kept", *method.not_decayed):
            model.register_parameter(f"{part}1", nn.Parameter(torch.ones(2)))
        groups = parameter_groups(config(), 1e-6, adapter, {"unet": model})
        decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        for key, parameter in model.named_parameters():
            assert decays[id(parameter)] == (1e-4 if key == "kept1" else 0.0), (name, key)


def test_learning_rates_by_part():
    plus = make_adapter("loraplus", resolve("loraplus", [], {}))
    groups = parameter_groups(config(learning_rate=1e-4), 1e-6, plus, MODELS)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("unet", 1e-4, 1e-4),
        ("unet", 16e-4, 1e-4),
        ("text_encoder", 1e-6, 1e-3),
        ("text_encoder", 16e-6, 1e-3),
    ]
    assert groups[1]["params"][0] is MODELS["unet"].lora_B.weight
    lora = make_adapter("lora", resolve("lora", [], {}))
    prodigy = parameter_groups(config(optimizer="prodigy", learning_rate=1.0), 1e-6, lora, MODELS)
    assert {group["lr"] for group in prodigy} == {1.0}


def test_scaled_learning_rate():
    assert scaled_learning_rate(config(learning_rate=1e-4, scale_lr=True), 24) == pytest.approx(24e-4)
    assert scaled_learning_rate(config(), 24) == 1e-4


def test_polynomial_schedule_has_its_power():
    one = config(lr_scheduler="polynomial", lr_power=2.0, learning_rate=1.0)
    optimizer = build_optimizer(one, [{"params": [nn.Parameter(torch.zeros(1))]}])
    schedule = build_schedule(one, optimizer, 10)
    for _ in range(5):
        schedule.step()
    assert schedule.get_last_lr()[0] == pytest.approx(0.25, abs=1e-4)


def test_restarts():
    one = config(lr_scheduler="cosine_with_restarts", lr_num_cycles=2, learning_rate=1.0)
    schedule = build_schedule(one, build_optimizer(one, [{"params": [nn.Parameter(torch.zeros(1))]}]), 10)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        schedule.step()
    assert rates[0] == rates[5] == 1.0 and rates[4] < 0.2


def test_average_is_applied_and_taken_away():
    parameter = nn.Parameter(torch.zeros(1))
    average = Average([parameter], decay=0.5)
    for value in (1.0, 2.0, 3.0):
        parameter.data.fill_(value)
        average.step()
    with average.applied():
        inside = parameter.item()
    assert parameter.item() == 3.0 and 1.0 < inside < 3.0
    other = Average([parameter], decay=0.5)
    other.load_state_dict(average.state_dict())
    other.copy_to_parameters()
    assert parameter.item() == inside
    nothing = Average([parameter], decay=None)
    nothing.step()
    with nothing.applied():
        assert parameter.item() == inside
    assert nothing.state_dict() == {}


def test_an_average_goes_on_where_its_parameters_are():
    """accelerate reads a checkpoint to the CPU; meta stands for a GPU."""
    saved = Average([nn.Parameter(torch.ones(2))], 0.9).state_dict()
    average = Average([nn.Parameter(torch.ones(2, device="meta"))], 0.9)
    average.load_state_dict(saved)
    average.step()
    assert average.ema.shadow_params[0].device.type == "meta"


# --- rates at which nothing is learned --------------------------------------------------------------------------------


def warned(total_steps: int, **options) -> str:
    return " | ".join(check_rates(config(**options), total_steps))


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"])
def test_500_warmup_steps_of_20_steps_are_said_with_the_rate_that_they_end_at(name):
    text = warned(20, lr_scheduler=name, lr_warmup_steps=500)
    assert "--lr_warmup_steps 500 of a run of 20 steps: the learning rate ends at 3.8e-06 and never reaches" in text
    assert not warned(600, lr_scheduler=name, lr_warmup_steps=500)
    assert not warned(20, lr_scheduler="constant", lr_warmup_steps=500)


def test_last_rate_is_that_of_the_last_step():
    for name in ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup", "constant"):
        one = config(lr_scheduler=name, lr_warmup_steps=3, lr_num_cycles=2, learning_rate=1e-3)
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1e-3)
        schedule = build_schedule(one, optimizer, 10)
        for _ in range(9):
            optimizer.step()
            schedule.step()
        assert last_rate(one, 10) == pytest.approx(schedule.get_last_lr()[0])


def test_a_polynomial_schedule_that_is_all_warmup_is_refused():
    """diffusers divides by zero after the last step."""
    with pytest.raises(ValueError, match="--lr_warmup_steps 20 are all steps of the run"):
        warned(20, lr_scheduler="polynomial", lr_warmup_steps=20)


def test_more_restarts_than_steps_are_said():
    assert "--lr_num_cycles 20 of the 20 steps" in warned(20, lr_scheduler="cosine_with_restarts", lr_num_cycles=20)
    assert not warned(20, lr_scheduler="cosine_with_restarts", lr_num_cycles=10)


@pytest.mark.parametrize("rate", [1e-4, 0.1])
def test_prodigy_at_a_rate_of_adam_is_said(rate):
    assert "is too low for --optimizer prodigy, which finds the rate itself: use 1.0" in warned(
        20, optimizer="Prodigy", learning_rate=rate
    )
    assert not warned(20, optimizer="prodigy", learning_rate=1.0)


@pytest.mark.parametrize("name", ["AdamW", "adam", "NAdam", "RAdam", "Adamax"])
def test_adam_at_a_rate_of_prodigy_is_said(name):
    assert f"--learning_rate 1 is too high for --optimizer {name}" in warned(20, optimizer=name, learning_rate=1.0)
    assert not warned(20, optimizer=name, learning_rate=0.1)
    assert not warned(20, optimizer="SGD", learning_rate=1.0)
