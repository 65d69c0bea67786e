"""Files of earlier versions are read by this one: one of each kind is kept here, as it was written then."""

from pathlib import Path

import torch
from torch import Tensor, nn

import pege_fx
from pege_fx import PEGEScheduler, QuantPolicy, QuantSpec, Rule
from pege_fx.serialization import tensor_tree
from pege_fx.serialization.checkpoint import KIND

FILES = Path(__file__).parent / "files"
CHECKPOINT, DEPLOYED = FILES / "checkpoint-0.1.safetensors", FILES / "deployed-2.safetensors"


class Net(nn.Module):
    """The model of the files."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.down = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, bias=False)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        y: Tensor = self.fc(self.down(x).mean((2, 3)))
        return y


POLICY = QuantPolicy(
    (
        Rule(weight="8", input="8"),
        Rule(match="down", weight="2", input=QuantSpec(bits=4, method="pact")),
        Rule(match="fc", weight=QuantSpec(bits=3, estimator="ewgs", narrow=True), input="4"),
    )
)


def test_a_checkpoint_says_the_policy_that_it_was_written_under() -> None:
    info = pege_fx.checkpoint_info(CHECKPOINT)
    assert info.policy == POLICY
    assert info.model == "Net"
    assert len(info.sites) == 6


def test_a_run_goes_on_from_a_checkpoint() -> None:
    x, y = (pege_fx.checkpoint_info(CHECKPOINT).extra[name] for name in ("x", "y"))
    gm = pege_fx.prepare(Net(), POLICY, (x,))
    scheduler, optimizer = PEGEScheduler(gm, total_steps=10), torch.optim.Adam(gm.parameters(), 1e-2)
    before = torch.get_rng_state()
    assert pege_fx.load(CHECKPOINT, gm, scheduler=scheduler, optimizer=optimizer) is gm
    torch.set_rng_state(before)
    tree = tensor_tree.read(CHECKPOINT, KIND)
    assert gm.state_dict().keys() == tree["model"].keys()
    for name, value in gm.state_dict().items():
        torch.testing.assert_close(value, tree["model"][name].to(value.dtype), rtol=0, atol=0)
    assert {name: int(site.site_key) for name, site in pege_fx.fake_quants(gm).items()} == tree["masks"]
    assert scheduler.state_dict() == tree["scheduler"]
    assert all(int(state["step"]) == 3 for state in optimizer.state_dict()["state"].values())
    torch.testing.assert_close(gm.eval()(x), y)


def test_a_float_model_is_prepared_as_it_was_for_a_checkpoint() -> None:
    info = pege_fx.checkpoint_info(CHECKPOINT)
    gm = pege_fx.load(CHECKPOINT, Net(), example_inputs=(info.extra["x"],))
    assert pege_fx.plan_of(gm).fingerprint == info.fingerprint
    torch.testing.assert_close(gm.eval()(info.extra["x"]), info.extra["y"])


def test_a_deployed_model_computes_what_it_did() -> None:
    extra = pege_fx.checkpoint_info(CHECKPOINT).extra
    torch.testing.assert_close(pege_fx.load_deployed(DEPLOYED)(extra["x"]), extra["y"])
