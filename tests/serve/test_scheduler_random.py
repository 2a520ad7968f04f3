"""The scheduler under requests that come, run, end and fail in any order (the device: fake_device.py)."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.serve.fake_device import World
from v4jax.core.errors import UserError


class Serving(RuleBasedStateMachine):
    """Requests come, run, end and fail in any order over tiny pools; `World` checks what may never happen."""

    @initialize(
        pages=st.integers(9, 14),
        records=st.integers(0, 5),
        slots=st.integers(1, 4),
        block=st.integers(1, 3),
        chunk=st.integers(1, 6),
        lookahead=st.integers(0, 2),
        late=st.integers(0, 2),
        snapshot_interval_blocks=st.integers(0, 2),
        replay=st.booleans(),
        random_seed=st.integers(0, 99),
    )
    def start(self, lookahead, late, **options):
        self.world = World(lookahead=lookahead, slack=lookahead + late, **options)

    @rule(
        prompt=st.lists(st.sampled_from([1, 1, 2]), min_size=1, max_size=6),
        max_tokens=st.integers(1, 6),
        salt=st.sampled_from(["", "", "other", None]),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
    )
    def come(self, prompt, max_tokens, salt, priority):
        try:
            self.world.add(len(self.world.everyone), prompt, max_tokens, salt, priority)
        except UserError:
            assert len(prompt) + max_tokens + 1 > self.world.blocks.capacity * self.world.scheduler.block_size

    @precondition(lambda self: len(self.world.flight) < 2)
    @rule()
    def step(self):
        self.world.step()

    @precondition(lambda self: self.world.flight)
    @rule()
    def commit(self):
        self.world.commit()

    @precondition(lambda self: self.world.everyone)
    @rule(which=st.integers(0, 99))
    def cancel(self, which):
        self.world.scheduler.abort_request(which % len(self.world.everyone))

    @precondition(lambda self: self.world.everyone)
    @rule(which=st.integers(0, 99))
    def fail(self, which):
        row = self.world.everyone[which % len(self.world.everyone)]
        own = row.block_ids[row.num_cached_blocks :]
        if self.world.scheduler.fail_request(row.id):
            assert not set(own) & set(self.world.blocks._page.values())

    @invariant()
    def invariants(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.drain()


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
