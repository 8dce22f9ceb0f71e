"""Nothing leaks: whatever is added, aborted, preempted or finished, every page has exactly one owner."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from nextn.protocol.messages import AddRequest
from nextn.protocol.sampling import TokenSampling
from nextn.scheduler.kv_pages import KVPages
from nextn.scheduler.scheduler import Decision, Scheduler, SchedulerConfig

EOS = 7
NUM_PAGES = 12
PAGE_SIZE = 4
CONTEXT = NUM_PAGES * PAGE_SIZE


class SchedulerMachine(RuleBasedStateMachine):
    """Drives the scheduler as the engine does, with a model that decides arbitrary tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_running=3,
                max_queued=100,
                max_prefill_tokens=6,
                context_length=CONTEXT,
                num_drafts=3,
                by_priority=True,
                eos_token_ids=(EOS,),
            ),
            KVPages(NUM_PAGES, PAGE_SIZE),
        )
        self.num_added = 0
        self.ended: set[str] = set()
        self.with_entries: set[int] = set()

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        max_new=st.integers(1, 20),
        priority=st.integers(0, 2),
        salt=st.sampled_from(["", "a"]),
        prompt_logprobs_start=st.sampled_from([None, None, 0, 3]),
    )
    def add(self, prompt: list[int], max_new: int, priority: int, salt: str, prompt_logprobs_start: int | None) -> None:
        self.num_added += 1
        self.scheduler.add(
            AddRequest(
                rid=str(self.num_added),
                input_ids=prompt,
                sampling=TokenSampling(max_new_tokens=max_new, seed=0),
                priority=priority,
                cache_salt=salt,
                prompt_logprobs_start=prompt_logprobs_start,
            )
        )

    @precondition(lambda self: self.scheduler.has_work)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        rid = data.draw(st.sampled_from([seq.request.rid for seq in self.scheduler.sequences]))
        seq = self.scheduler.abort(rid)
        assert seq is not None
        assert not seq.pages
        assert self.scheduler.abort(rid) is None, "a second abort must find nothing"
        self._note_end(rid)

    @precondition(lambda self: self.scheduler.has_work)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        extends = self.scheduler.schedule()
        assert extends, "there is work, but nothing runs"
        assert len({id(extend.seq) for extend in extends}) == len(extends)
        prompt_tokens = sum(e.num_tokens for e in extends if not e.seq.is_decoding)
        assert prompt_tokens <= 6, "a step computes more prompt than its budget"
        for extend in extends:
            seq = extend.seq
            assert extend.start == seq.num_computed
            assert len(seq.pages) * PAGE_SIZE >= extend.end + extend.num_drafts, "no slot for the last draft"
            accepted = data.draw(st.integers(0, extend.num_drafts))
            tokens = data.draw(st.lists(st.sampled_from([0, 1, EOS]), min_size=accepted + 1, max_size=accepted + 1))
            # The draft layer may lag behind; the prefix cache must not claim entries that it lacks.
            num_draft_computed = data.draw(st.integers(seq.num_draft_computed, extend.end))
            decision = Decision(tokens if extend.decides else [], accepted, num_draft_computed=num_draft_computed)
            # Pages that the sequence alone writes to have entries as far as it made them.
            self.with_entries.difference_update(seq.pages[max(len(seq.nodes), seq.num_draft_computed // PAGE_SIZE) :])
            self.with_entries.update(seq.pages[: num_draft_computed // PAGE_SIZE])
            self.scheduler.commit(extend, decision)
            if seq.finish_reason is not None:
                assert seq.finish_reason == ("stop" if seq.tokens[-1] == EOS else "length")
                self._note_end(seq.request.rid)

    @rule()
    def flush(self) -> None:
        self.scheduler.pages.flush()

    def _note_end(self, rid: str) -> None:
        assert rid not in self.ended, "a request ended twice"
        self.ended.add(rid)

    @invariant()
    def every_page_has_one_owner(self) -> None:
        self.scheduler.check()

    @invariant()
    def nobody_waits_for_memory_that_there_is(self) -> None:
        scheduler, pages = self.scheduler, self.scheduler.pages
        if scheduler.may_admit or not scheduler.waiting or len(scheduler.running) == 3:
            return
        first = scheduler.waiting[0]
        path = pages.cache.match(first.tokens, first.request.cache_salt, scheduler._max_prefix(first))
        missing = pages.pages_for(len(first.tokens) + 1) - len(path)
        assert missing > pages.num_available - sum(node.ref_count == 0 for node in path)

    @invariant()
    def the_prefix_cache_claims_no_entries_that_were_not_made(self) -> None:
        claimed = {node.page for node in self.scheduler.pages.cache.nodes() if node.has_draft}
        assert claimed <= self.with_entries

    def teardown(self) -> None:
        """Everything still here runs to its end with the shortest outputs; then all pages are free or unreferenced."""
        for _ in range(2000):
            if not self.scheduler.has_work:
                break
            for extend in self.scheduler.schedule():
                self.scheduler.commit(extend, Decision([EOS] if extend.decides else []))
            self.scheduler.check()
        assert not self.scheduler.has_work, "a request never ends"
        assert len({*self.ended}) <= self.num_added
        pages = self.scheduler.pages
        assert pages.num_free + pages.cache.num_evictable == NUM_PAGES
        pages.flush()
        assert pages.num_free == NUM_PAGES


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
