"""Help: the method in seven steps, words, limits, when not to use it, versions, keys."""

from __future__ import annotations

from importlib.metadata import version

import streamlit as st

from analysis.selftest import check, synthetic_run
from analysis.verdicts import VERDICTS, WEAK
from app import library, state
from app.components import markup

_METHOD = (
    "A language model reads a text as tokens, which are words or pieces of words, and works on each in many layers, "
    "one after the other. In each layer several heads look back at earlier tokens: attention says how much each one "
    "counts.",
    "For that a head keeps a key, which says what a token is found by, and a value, which is what is read there: the "
    "KV cache. It grows with the text, and can take more memory than the model: for long texts, or for many at once.",
    "Keys and values are lists of numbers; the (L2) norm of a key is its length. Keys with a low norm tend to get high "
    "attention later. So the keys with the highest norms can be evicted, with no attention scores and no training.",
    "How well that holds differs by model, layer and head. Often it is one token, the attention sink, that carries it.",
    "For each head this app measures whether low norms get the attention: −1 says that they do, 0 that norms say "
    "nothing, +1 the opposite. This is Γ, the Gini correlation of key norm and attention.",
    "It also measures the attention that is lost by evicting high norms first, beyond what the best order would lose: "
    "ALR. Normalised, it is 0 for the best order, 1 for a random one and 2 for the reverse.",
    "Neither tells what compression costs: that is measured on tasks, beside the full cache, on the pages Verdict and "
    "Evaluate.",
)
_ALR = r"\mathrm{ALR}_{l,h} = \sum_m \left( L^{\mathrm{norm}}_{l,h}(m) - L^{\mathrm{best}}_{l,h}(m) \right)"
_GLOSSARY = {
    "token": "a word or a piece of one, as the model reads and writes it",
    "layer": "one of the steps in which a model works on each token; each has heads and a cache of its own",
    "head": "a part of a layer that looks back at earlier tokens in its own way",
    "attention": "how much each earlier token counts for a head, as a share: all together make 1",
    "norm, or L2 norm": "the length of a key",
    "solid, hollow": "a token of the prompt that at least half of the heads still hold, or fewer; one that is solid "
    "can be lost in the heads that matter",
    "passkey": "a number that is hidden in repeated sentences, and asked for at the end",
    "needle": "a sentence that is hidden in prose, and what it says asked for at the end",
    "perplexity": "how unsure the model is of each next token, as if it chose among so many: less is better",
    "plan": "keep ratios of each layer or head, in place of one for all",
    "GO, NO-GO": "whether compression passes all the limits of the page Verdict; GO WITH A PLAN: a plan of the same "
    "bytes does; NOT YET: more has to be measured",
    "temperature": "how freely tokens are drawn: 0 takes the most probable one, 1 draws as the model predicts",
    "top-p": "only the most probable tokens are drawn, as many as make up this share of the probability",
    "seed": "number that drawing at random starts from: the same one draws the same again",
    "chat template": "the frame that a model for chats was taught to read questions in",
    "keep ratio": "share of the tokens seen that each head keeps",
    "recent window, or window": "the latest tokens, which are never evicted",
    "attention sink": "the first token, which often gets most of the attention whatever it is",
    "skipped layers": "layers that keep everything",
    "evicted": "removed from the cache, as if never read there",
    "policy": "the rule that ranks keys for eviction, such as low norm or KeyDiff",
    "kv head": "a head of the cache; several query heads may read the same one",
    "ΔNLL": "how much worse the next token is predicted, in nats: its mean negative log-likelihood changes so; "
    "exp(ΔNLL) is the perplexity ratio",
    "payload": "bytes of the keys and values held, without slack",
    "query": "what a head looks for from the token that it is at; keys answer it",
    "probe": "the queries whose attention a number is of: the next token, the last queries, or all of them",
}
_LIMITS = (
    "One text says little: take a study of many before you skip a layer.",
    "On a CPU the app computes in float32; a cache in bfloat16 ranks keys with nearly equal norms differently.",
    "Speed measured here is of this machine. On a GPU decoding is bound by memory, and the bound is shown beside it.",
    "A compressed cache can't be cropped, so it is no use for assisted or contrastive decoding.",
)
_NOT_FOR = (
    "Short prompts: a few hundred tokens take little memory.",
    "Models whose layers have a sliding window, or that cache latents (DeepSeek's MLA): there is little to save.",
    "Answers that must quote the prompt word for word: needles may be among the evicted.",
)
_KEYS = {
    "← → ↑ ↓": "move to the next head in the map (Explore)",
    "[ ]": "previous and next query (Explore)",
    "← →, Shift, Home, End": "one step, ten steps, the first, the last (slider of the eviction time machine)",
    "Space": "play the generation, or pause it (the same slider)",
    "← →, Home, End, Space, P, Esc": "one token back or on, the first, the last, play or pause, present, close (story "
    "of the page Demo)",
    "← → ↑ ↓, Enter": "move to a token and choose it (strip of the eviction time machine)",
    "?": "list the keys of the page",
}


def draw() -> None:
    """Draw the page."""
    st.title("Help")
    left, right = st.columns([3, 2], gap="large")
    with left:
        st.subheader("The method")
        st.markdown("\n".join(f"{i}. {sentence}" for i, sentence in enumerate(_METHOD, start=1)))
        st.caption(
            "ALR sums up, with L(m) the attention lost by evicting m tokens, of highest norm or least attention:"
        )
        st.latex(_ALR)
        st.subheader("Verdicts on a head")
        meanings = {name: of.on_many or of.on_one for name, of in VERDICTS.items()}
        st.markdown("\n".join(f"- **{name}**: {markup.plain(meaning)}" for name, meaning in meanings.items()))
        st.caption(f"On one text a sign counts if |Γ| ≥ {WEAK}; on many, if its 95 % interval is on one side of 0.")
    with right:
        st.subheader("Words")
        st.markdown("\n".join(f"- **{word}**: {meaning}" for word, meaning in sorted(_GLOSSARY.items())))
        st.subheader("Limits")
        st.markdown("\n".join(f"- {limit}" for limit in _LIMITS))
        st.subheader("When not to use it")
        st.markdown("\n".join(f"- {case}" for case in _NOT_FOR))
        st.subheader("Keyboard")
        st.table({"key": list(_KEYS), "what it does": list(_KEYS.values())})
    _self_test()
    st.subheader("Source")
    st.markdown(
        "A. Devoto, Y. Zhao, S. Scardapane, P. Minervini: *A Simple and Effective L2 Norm-Based Strategy for KV Cache "
        "Compression*, EMNLP 2024, arXiv 2406.11430."
    )
    packages = ("torch", "transformers", "streamlit", "plotly", "scipy")
    st.caption(" · ".join(f"{name} {version(name)}" for name in packages))


def _self_test() -> None:
    """Measure a run whose metrics are known, and open it."""
    st.subheader("Self-test")
    st.markdown(
        "A synthetic run, made by no model, has Γ of exactly −1 in layer 0, 0 in layer 1 and +1 in layer 2. Does this "
        "app read what is there?"
    )
    if st.button("Run the self-test", icon=":material/science:", key="self_test"):
        found = check(synthetic_run())
        (st.success if found.passed else st.error)(markup.plain(str(found)))
    if st.button("Open its run", icon=":material/open_in_new:", key="open_self_test"):
        state.show_run(library.WORKSPACE.add(synthetic_run(), name="Self-test").id)
        st.rerun()
