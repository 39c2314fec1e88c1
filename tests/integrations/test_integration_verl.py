"""Test our functions in verl's registries and fused head against verl if it is installed, otherwise against a stand-in.

The stand-in has the names and argument lists of verl 0.9 and its own formulas, which are written out here.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

HAS_VERL = importlib.util.find_spec("verl") is not None


def vanilla(
    old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None, rollout_is_weights=None
):
    """Return the ratio loss clipped on both sides, and at clip_ratio_c if the advantage is negative."""
    ratio = torch.exp(log_prob - old_log_prob)
    bounded = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    loss = torch.maximum(-advantages * ratio, -advantages * bounded)
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * config.clip_ratio_c), loss)
    if rollout_is_weights is not None:
        loss = loss * rollout_is_weights
    return agg_loss(loss, response_mask, loss_agg_mode, **config.global_batch_info), {}


def agg_loss(
    loss_mat, loss_mask, loss_agg_mode, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None
):
    masked = torch.where(loss_mask.bool(), loss_mat, 0.0)
    if loss_agg_mode == "token-mean":
        return masked.sum() / (batch_num_tokens or loss_mask.sum()) * dp_size
    assert loss_agg_mode == "seq-mean-token-mean"
    return (masked.sum(1) / loss_mask.sum(1)).mean() * dp_size


class PlainHead(torch.nn.Module):
    """A head that computes what verl's head computes: logits, log_softmax, entropy."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()

    def forward(self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0):
        logp = ((hidden_states @ vocab_weights.T) / temperature).float().log_softmax(-1)
        return logp.gather(-1, input_ids.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def k3(config, distillation_config, model_output, data):
    d = to_padded(data["teacher_logprobs"], data).squeeze(-1) - to_padded(model_output["log_probs"], data)
    return torch.exp(d) - d - 1, {}


def to_padded(tensor: Tensor, data: dict) -> Tensor:
    """Convert rows of whole sequences [total, ...] to the positions that predict a response, [B, responses, ...]."""
    mask = data["attention_mask"]
    width = data["responses"].shape[1]
    rows = torch.zeros(*mask.shape, *tensor.shape[1:], dtype=tensor.dtype)
    rows = rows.masked_scatter(mask.bool().reshape(*mask.shape, *[1] * (tensor.ndim - 1)), tensor)
    return rows[:, -width - 1 : -1]


class Metric:
    def __init__(self, aggregation, value=None):
        self.values = [float(value)]


def stand_in() -> None:
    """Install the modules of verl 0.9 that the integration imports."""
    leaves = (
        "trainer.ppo.core_algos",
        "trainer.distillation.losses",
        "utils.metric",
        "utils.experimental.torch_functional",
        "utils.kernel.linear_cross_entropy",
        "workers.utils.padding",
    )
    paths = [["verl", *leaf.split(".")] for leaf in leaves]
    names = dict.fromkeys(".".join(path[:depth]) for path in paths for depth in range(1, len(path) + 1))
    for name in names:
        sys.modules[name] = ModuleType(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])

    def register(registry):
        return lambda name: lambda function: registry.setdefault(name, function)

    algorithms = sys.modules["verl.trainer.ppo.core_algos"]
    algorithms.POLICY_LOSS_REGISTRY = {"vanilla": vanilla}
    algorithms.register_policy_loss = register(algorithms.POLICY_LOSS_REGISTRY)
    algorithms.get_policy_loss_fn = algorithms.POLICY_LOSS_REGISTRY.__getitem__
    algorithms.agg_loss = agg_loss
    losses = sys.modules["verl.trainer.distillation.losses"]
    losses.DISTILLATION_LOSS_REGISTRY = {"k3": k3}
    losses.DistillationLossSettings = SimpleNamespace
    losses.register_distillation_loss = lambda settings: register(losses.DISTILLATION_LOSS_REGISTRY)(settings.names[0])
    metric = sys.modules["verl.utils.metric"]
    metric.Metric, metric.AggregationType = Metric, SimpleNamespace(MEAN="mean")
    sys.modules["verl.workers.utils.padding"].no_padding_2_padding = to_padded
    sys.modules["verl.utils.experimental.torch_functional"].FusedLinearForPPO = PlainHead
    sys.modules["verl.utils.kernel.linear_cross_entropy"].linear_cross_entropy = lambda *_: None


@pytest.fixture
def verl(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return verl's modules and our integration, with unmodified registries."""
    monkeypatch.delitem(sys.modules, "rmsd_fast.integrations.verl", raising=False)
    if not HAS_VERL:
        for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
            monkeypatch.delitem(sys.modules, name)
        before = set(sys.modules)
        stand_in()
    import verl.trainer.distillation.losses as distillation
    import verl.trainer.ppo.core_algos as algorithms
    import verl.utils.experimental.torch_functional as head

    import rmsd_fast.integrations.verl as ours

    if HAS_VERL:
        for registry in (algorithms.POLICY_LOSS_REGISTRY, distillation.DISTILLATION_LOSS_REGISTRY):
            for name in [name for name in registry if name.startswith("rmsd")]:
                monkeypatch.delitem(registry, name)
    yield SimpleNamespace(ours=ours, algorithms=algorithms, distillation=distillation, head=head)
    for registry in (algorithms.POLICY_LOSS_REGISTRY, distillation.DISTILLATION_LOSS_REGISTRY):
        for name in [name for name in registry if name.startswith("rmsd")]:
            del registry[name]
    if not HAS_VERL:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "verl":
                del sys.modules[name]
    sys.modules.pop("rmsd_fast.integrations.verl", None)


def config(**changes):
    """Return the part of verl's ActorConfig that policy losses read, or the real ActorConfig if available."""
    values = {
        "clip_ratio": 0.2,
        "clip_ratio_low": 0.1,
        "clip_ratio_high": 0.3,
        "clip_ratio_c": 3.0,
        "global_batch_info": {"dp_size": 1},
        **changes,
    }
    if HAS_VERL:
        from verl.workers.config import ActorConfig

        return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **values)
    return SimpleNamespace(**values)


def rollout(seed: int = 0, rows: int = 5, length: int = 7) -> dict[str, Tensor]:
    """Return ragged ratios from 0.6 to 1.7, some clipped on either side, with one advantage per row as in GRPO."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 + torch.randn(rows, length, generator=generator)
    lengths = torch.tensor([7, 1, 4, 6, 2][:rows])
    return {
        "old_log_prob": old,
        "log_prob": old + 0.25 * torch.randn(rows, length, generator=generator),
        "advantages": torch.randn(rows, 1, generator=generator).expand(rows, length).contiguous(),
        "response_mask": (torch.arange(length) < lengths.unsqueeze(1)).long(),
        "rollout_is_weights": torch.rand(rows, length, generator=generator) + 0.5,
    }


def value_and_gradient(function, batch: dict[str, Tensor], **extra) -> tuple[Tensor, Tensor, dict]:
    log_prob = batch["log_prob"].clone().requires_grad_()
    loss, metrics = function(**{**batch, "log_prob": log_prob}, **extra)
    loss.backward()
    return loss.detach(), log_prob.grad, metrics


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_policy_loss_equals_that_of_verl(verl, mode: str, weighted: bool) -> None:
    """Below a ratio of clip_ratio_c, both losses have the same formula and order of summation."""
    ours = verl.ours.register_policy_loss("rmsd")
    assert verl.algorithms.get_policy_loss_fn("rmsd") is ours
    batch = rollout()
    if not weighted:
        del batch["rollout_is_weights"]
    theirs = verl.algorithms.get_policy_loss_fn("vanilla")
    expected = value_and_gradient(theirs, batch, loss_agg_mode=mode, config=config())
    found = value_and_gradient(ours, batch, loss_agg_mode=mode, config=config())
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-7)
    assert set(found[2]) == {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}
    assert 0 < found[2]["actor/pg_clipfrac"] < 1
    for name, value in expected[2].items():
        assert found[2][name] == pytest.approx(float(value), rel=1e-5, abs=1e-7), name


def test_policy_loss_divides_by_the_count_of_the_whole_batch(verl) -> None:
    """With verl's dp_size and batch_num_tokens, micro-batch losses add up to the loss of the whole batch."""
    ours, batch = verl.ours.register_policy_loss("rmsd"), rollout()
    tokens = int(batch["response_mask"].sum())
    part = config(global_batch_info={"dp_size": 2, "batch_num_tokens": 4 * tokens})
    whole = value_and_gradient(ours, batch, loss_agg_mode="token-mean", config=config())
    share = value_and_gradient(ours, batch, loss_agg_mode="token-mean", config=part)
    torch.testing.assert_close(share[0] * 2, whole[0])
    torch.testing.assert_close(share[1] * 2, whole[1])


def test_sequence_ratio(verl) -> None:
    """One response has ratios of exp(0.2) and exp(0.4), whose mean exp(0.3) is above 1 + 0.3."""
    ours = verl.ours.register_policy_loss("rmsd_sequence", importance_level="sequence")
    batch = {
        "old_log_prob": torch.zeros(1, 3),
        "log_prob": torch.tensor([[0.2, 0.4, 9.0]]),
        "advantages": torch.ones(1, 3),
        "response_mask": torch.tensor([[1, 1, 0]]),
    }
    loss, gradient, metrics = value_and_gradient(ours, batch, loss_agg_mode="token-mean", config=config())
    assert loss.item() == pytest.approx(-1.3)
    assert metrics["actor/pg_clipfrac"] == 1.0 and not gradient.any()
    wide = config(clip_ratio_high=0.5)
    loss, gradient, metrics = value_and_gradient(ours, batch, loss_agg_mode="token-mean", config=wide)
    ratio = torch.tensor(0.3).exp().item()
    assert loss.item() == pytest.approx(-ratio) and metrics["actor/pg_clipfrac"] == 0.0
    torch.testing.assert_close(gradient, torch.tensor([[-ratio / 2, -ratio / 2, 0.0]]))
    if HAS_VERL:
        batch, mode = rollout(), "seq-mean-token-mean"
        del batch["rollout_is_weights"]
        expected = value_and_gradient(
            verl.algorithms.get_policy_loss_fn("gspo"), batch, loss_agg_mode=mode, config=wide
        )
        found = value_and_gradient(ours, batch, loss_agg_mode=mode, config=wide)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)


def test_values_in_padding_have_no_effect(verl) -> None:
    ours, batch = verl.ours.register_policy_loss("rmsd"), rollout()
    expected = value_and_gradient(ours, batch, loss_agg_mode="token-mean", config=config())
    padding = batch["response_mask"] == 0
    for name in ("old_log_prob", "log_prob"):
        batch[name] = batch[name].masked_fill(padding, torch.nan)
    found = value_and_gradient(ours, batch, loss_agg_mode="token-mean", config=config())
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    # A ratio beyond the range of float32 has a finite loss and gradient.
    batch = rollout() | {"log_prob": rollout()["old_log_prob"] + 200.0}
    loss, gradient, _ = value_and_gradient(ours, batch, loss_agg_mode="token-mean", config=config())
    assert loss.isfinite() and gradient.isfinite().all()


def sequences() -> tuple[Tensor, dict]:
    """Return student log-probs of packed sequences [total] and a batch of 2 prompts of 2 tokens, 3 response tokens."""
    attention = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    generator = torch.Generator().manual_seed(4)
    total = int(attention.sum())
    data = {
        "prompts": torch.ones(2, 2, dtype=torch.int64),
        "responses": torch.ones(2, 3, dtype=torch.int64),
        "attention_mask": attention,
        "response_mask": attention[:, 2:],
        "teacher_logprobs": -2 + torch.randn(total, 1, generator=generator),
    }
    if HAS_VERL:
        from tensordict import TensorDict

        teacher = data.pop("teacher_logprobs")
        offsets = torch.tensor([0, 5, 8])
        data = TensorDict(data, batch_size=2)
        data["teacher_logprobs"] = torch.nested.nested_tensor_from_jagged(teacher, offsets)
    return -2 + torch.randn(total, generator=generator), data


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_distillation_loss(verl, kl: str) -> None:
    """The values are computed from d = teacher - student; k3 equals verl's where verl does not clamp."""
    ours = verl.ours.register_distillation_loss(f"rmsd_{kl}", kl=kl)
    assert verl.distillation.DISTILLATION_LOSS_REGISTRY[f"rmsd_{kl}"] is ours
    student, data = sequences()
    settings = SimpleNamespace(distillation_loss=SimpleNamespace(use_policy_gradient=True, loss_mode=kl, topk=None))
    student.requires_grad_()
    losses, metrics = ours(None, settings, {"log_probs": student}, data)
    teacher = data["teacher_logprobs"]
    teacher = (teacher.values() if teacher.is_nested else teacher).squeeze(-1)
    # The predicting positions are tokens 1-3 of the first sequence and token 1 of the second, which has 3 tokens.
    d = torch.zeros(2, 3)
    d[0], d[1, 0] = (teacher - student.detach())[1:4], (teacher - student.detach())[6]
    expected = {"k1": -d, "k2": d * d / 2, "k3": torch.exp(d) - d - 1}[kl]
    torch.testing.assert_close(losses.detach(), expected, rtol=1e-5, atol=1e-6)
    losses.sum().backward()
    scored = torch.tensor([0, 1, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    assert student.grad[scored].all() and not student.grad[~scored].any()
    assert metrics["distillation/abs_loss"].values == pytest.approx([expected.abs().sum().item() / 4], rel=1e-5)
    if kl == "k3":
        theirs = verl.distillation.DISTILLATION_LOSS_REGISTRY["k3"](None, settings, {"log_probs": student}, data)[0]
        mask = data["response_mask"].bool()
        torch.testing.assert_close(losses[mask], theirs[mask], rtol=1e-5, atol=1e-6)
    if kl == "k1":
        supervised = SimpleNamespace(distillation_loss=SimpleNamespace(use_policy_gradient=False))
        with pytest.raises(ValueError, match="k1 as a loss"):
            ours(None, supervised, {"log_probs": student}, data)


def test_distillation_clip(verl) -> None:
    ours = verl.ours.register_distillation_loss("rmsd_clip", kl="k2", kl_log_ratio_clip=0.5)
    student, data = sequences()
    settings = SimpleNamespace(distillation_loss=SimpleNamespace(use_policy_gradient=False))
    losses, _ = ours(None, settings, {"log_probs": student - 30}, data)
    torch.testing.assert_close(losses, 0.125 * data["response_mask"])


def test_head_equals_that_of_verl(verl) -> None:
    """Compare log-probs, entropy and both gradients in float32 for [B, L, D] and [T, D]."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(53, 16, generator=generator)
    for shape in ((11,), (2, 5)):
        hidden = torch.randn(*shape, 16, generator=generator)
        ids = torch.randint(0, 53, shape, generator=generator)
        upstream = torch.randn(2, *shape, generator=generator)
        results = []
        for head in (verl.head.FusedLinearForPPO(), verl.ours.FusedLinear(memory_budget_bytes=10_000)):
            x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            log_probs, entropy = head(hidden_states=x, vocab_weights=w, input_ids=ids, temperature=0.7)
            (log_probs * upstream[0] + entropy * upstream[1]).sum().backward()
            results.append((log_probs.detach(), entropy.detach(), x.grad, w.grad))
        for expected, found in zip(*results, strict=True):
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        flat = verl.ours.linear_cross_entropy(hidden, weight, ids, 0.7, "none")
        torch.testing.assert_close(flat[0], results[0][0].flatten(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(flat[1], results[0][1].flatten(), rtol=1e-5, atol=1e-5)
    per_position = torch.full((2, 5), 0.7)
    same, _ = verl.ours.FusedLinear()(hidden, weight, ids, per_position)
    torch.testing.assert_close(same.flatten(), flat[0])
    with pytest.raises(ValueError, match=r"input_ids: expected shape \[2, 5\]"):
        verl.ours.FusedLinear()(hidden, weight, ids.flatten())
    with pytest.raises(RuntimeError, match="reduction='mean'"):
        verl.ours.linear_cross_entropy(hidden, weight, ids, 1.0, "mean")


def actor(seed: int = 0):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16}
    return Qwen3ForCausalLM(
        Qwen3Config(vocab_size=97, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2, **shape)
    )


def log_probs_of(verl, model, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Run a forward pass as verl's actor does; without verl, make the same calls with the head of the stand-in."""
    if HAS_VERL:
        from verl.models.transformers.dense_common import forward_with_torch_backend

        output = forward_with_torch_backend(model, input_ids=ids, temperature=temperature, return_dict=True)
        return output.log_probs, output.entropy
    hidden = model.model(input_ids=ids).last_hidden_state
    head = verl.head.FusedLinearForPPO(impl_backend="torch")
    return head.forward(
        hidden_states=hidden,
        vocab_weights=model.lm_head.weight,
        input_ids=torch.roll(ids, -1, -1),
        temperature=temperature,
    )


def steps_of_an_actor(verl, loss_name: str) -> tuple[list[float], dict[str, Tensor]]:
    """Take four SGD steps with an entropy bonus; all but the first are off-policy."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 97, (4, 9), generator=generator)
    advantages = torch.randn(4, 1, generator=generator).expand(4, 6)
    mask = (torch.arange(6) < torch.tensor([6, 5, 1, 3]).unsqueeze(1)).long()
    model = actor()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss_of, losses, old = verl.algorithms.get_policy_loss_fn(loss_name), [], None
    for _ in range(4):
        log_probs, entropy = (values[:, 2:-1] for values in log_probs_of(verl, model, ids, 0.8))
        old = log_probs.detach() if old is None else old
        loss, _ = loss_of(
            old_log_prob=old,
            log_prob=log_probs,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode="token-mean",
            config=config(),
            rollout_is_weights=None,
        )
        loss = loss - 0.01 * (entropy * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def test_steps_of_an_actor(verl) -> None:
    """Compare float32 runs: losses within 1e-5, and weights within 1e-4 of the distance that they moved."""
    verl.ours.register_policy_loss("rmsd")
    own_losses, own = steps_of_an_actor(verl, "vanilla")
    theirs = verl.head.FusedLinearForPPO
    restore = verl.ours.install_fused_head()
    try:
        assert verl.head.FusedLinearForPPO is verl.ours.FusedLinear
        losses, fused = steps_of_an_actor(verl, "rmsd")
    finally:
        restore()
    assert verl.head.FusedLinearForPPO is theirs
    assert losses == pytest.approx(own_losses, rel=1e-5, abs=1e-6)
    before = actor().state_dict()
    moved = max((own[name] - before[name]).abs().max() for name in before)
    apart = max((own[name] - fused[name]).abs().max() for name in before)
    assert moved > 1e-2 and apart <= 1e-4 * moved, f"weights moved by {moved:.3g} and differ by {apart:.3g}"


def test_importing_the_module_once_installs_the_head(verl, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's workers do this with model.external_lib; the head stays after the import ends."""
    lines = "from rmsd_fast.integrations import verl as fused\nrestore = fused.install_fused_head()\n"
    (tmp_path / "rmsd_external_lib.py").write_text(lines)
    monkeypatch.syspath_prepend(tmp_path)
    theirs = verl.head.FusedLinearForPPO
    module = importlib.import_module("rmsd_external_lib")
    try:
        assert verl.head.FusedLinearForPPO is verl.ours.FusedLinear
    finally:
        module.restore()
        del sys.modules["rmsd_external_lib"]
    assert verl.head.FusedLinearForPPO is theirs


class Sharded(Tensor):
    """A parameter in the state that FSDP2 leaves it in outside of the forward of its module."""

    device_mesh = "mesh"

    def full_tensor(self) -> Tensor:
        return self.as_subclass(Tensor)


def test_a_sharded_head_is_refused_if_it_is_trained(verl) -> None:
    hidden, ids = torch.randn(3, 8), torch.tensor([1, 2, 3])
    weight = torch.randn(11, 8).as_subclass(Sharded).requires_grad_()
    with pytest.raises(RuntimeError, match="got a trained one sharded over mesh"):
        verl.ours.FusedLinear()(hidden, weight, ids)
    with torch.no_grad():
        log_probs, _ = verl.ours.FusedLinear()(hidden, weight, ids)
    expected, _ = verl.ours.FusedLinear()(hidden, weight.detach().as_subclass(Tensor), ids)
    torch.testing.assert_close(log_probs, expected)


def test_other_verl_versions_are_refused_by_missing_names(verl, monkeypatch: pytest.MonkeyPatch) -> None:
    verl.ours.register_policy_loss("rmsd")
    with pytest.raises(ValueError, match="'rmsd' is already registered"):
        verl.ours.register_policy_loss("rmsd")
    with pytest.raises(ValueError, match="importance_level: expected 'token' or 'sequence'"):
        verl.ours.register_policy_loss("rmsd2", importance_level="word")
    with pytest.raises(ValueError, match="kl: expected 'k1', 'k2' or 'k3'"):
        verl.ours.register_distillation_loss("rmsd_full", kl="full")
    monkeypatch.setitem(verl.algorithms.POLICY_LOSS_REGISTRY, "vanilla", lambda log_prob, config: None)
    with pytest.raises(RuntimeError, match="the policy loss 'vanilla': expected arguments old_log_prob, .* got"):
        verl.ours.register_policy_loss("rmsd2")
    monkeypatch.delattr(verl.head, "FusedLinearForPPO")
    with pytest.raises(RuntimeError, match=r"expected verl\.utils\.experimental\.torch_functional\.FusedLinearForPPO"):
        verl.ours.install_fused_head()


def test_import_without_verl_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocking only the parent is not enough if another test has imported its submodules.
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "rmsd_fast.integrations.verl", raising=False)
    with pytest.raises(ImportError, match=r"rmsd_fast\.integrations\.verl needs verl .*pip install verl"):
        importlib.import_module("rmsd_fast.integrations.verl")
