"""What tests of all methods share: prompts with everybody's metadata, two sequences side by side, predictions."""

from masked import masking
from sessions import Single

from kvscope.harness.engine.prefill import prefill
from kvscope.methods.base import SequenceCache, union_collectors
from kvscope.methods.registry import create_method


def prefilled(loaded, ids, specs, **options):
    """Prefill once for all ``specs``, with every collector they ask for, as a sweep does."""
    methods = [create_method(spec) for spec in specs]
    assert [reason for method in methods for reason in method.unsupported(loaded.shape, loaded.device)] == []
    return prefill(loaded, ids, collectors=union_collectors(methods, loaded.shape.layers), **options)


def assert_predicted(footprint, method, predicted):
    """Every byte and FLOP as predicted; where the data decide on the reads, predicted is the most they can be."""
    if method.reads_vary:
        assert footprint.bytes_read_per_step <= predicted.bytes_read_per_step
        assert footprint.attention_flops_per_step <= predicted.attention_flops_per_step
        kept = ("kv_bytes", "metadata_bytes", "host_bytes")
        assert [getattr(footprint, key) for key in kept] == [getattr(predicted, key) for key in kept]
    else:
        assert footprint == predicted


class Both(SequenceCache):
    """Feeds one call to the evicting and to the masking sequence, and notes how far their outputs are apart."""

    def __init__(self, evicting, masking):
        self.evicting, self.masking, self.errors = evicting, masking, []
        self.shape, self.stock = evicting.shape, evicting.stock

    @property
    def n_tokens(self):
        return self.evicting.n_tokens

    def observe(self, layer, hidden_BM):
        self.evicting.observe(layer, hidden_BM)
        self.masking.observe(layer, hidden_BM)

    def attend(self, *args, **options):
        evicted, masked = (side.attend(*args, **options) for side in (self.evicting, self.masking))
        self.errors.append(float((evicted.float() - masked.float()).norm() / masked.float().norm()))
        return evicted

    def managed_footprint(self):
        return self.evicting.managed_footprint()


def errors_of_evicting(loaded, method, prompt, tokens):
    """Decode ``tokens`` and return, call by call, the relative error of evicting against masking on equal queries.

    Two runs of a low-precision model drift apart by roundings, and a method that chooses by the query may then choose
    otherwise, which is no error of either: so one run feeds both.
    """

    class Beside:
        label, kv = method.label, None
        unsupported, observed_layers = method.unsupported, method.observed_layers

        def open(self, *args, **options):
            self.sequence = Both(*(each.open(*args, **options) for each in (method, masking(method))))
            return self.sequence

    beside = Beside()
    with Single(loaded, beside, prompt, reserve_tokens=len(tokens)) as session:
        for token in tokens:
            session.step(token)
        errors = beside.sequence.errors
    assert len(errors) == len(tokens) * len(loaded.shape.layers)
    return errors
