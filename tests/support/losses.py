"""Attention losses by slow loops over their definition in the paper. Shares no code with `analysis`."""


def expected_losses(attention, dropped_by):
    """L^m, m = 0..n, straight from the paper, dropping first what is highest by `dropped_by`: expected, where some are
    equal and any of them may be next."""
    curve = [0.0]
    for value in sorted(set(dropped_by), reverse=True):
        equals = [a for a, of_token in zip(attention, dropped_by, strict=True) if of_token == value]
        curve += [curve[-1] + sum(equals) * m / len(equals) for m in range(1, len(equals) + 1)]
    return curve


def slow_losses(run, layer, head, skip_first):
    """L^m of keeping low norms, of keeping high norms, and of the ideal order, m = 0..n."""
    attention = run.probe_attention[layer, head].astype(float).tolist()[skip_first:]
    norms = run.key_norm[layer, head // 3].tolist()[skip_first:]
    return (
        expected_losses(attention, norms),
        expected_losses(attention, [-x for x in norms]),
        expected_losses(attention, [-a for a in attention]),
    )
