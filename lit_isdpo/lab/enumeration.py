"""Every response of a small vocabulary, and what a language model says about all of them: sums instead of samples.

A vocabulary of K words and one end token, token ids 0 to K - 1 and K, has ``1 + K + ... + K^L`` responses of at most L
words. They are the nodes of a tree, a word an edge, numbered level by level (below K = 2, L = 2):

    0: ""       1: "0"   2: "1"       3: "0 0"   4: "0 1"   5: "1 0"   6: "1 1"

so the nodes one word longer than node i are ``K i + 1 ... K i + K``. A node is a prefix, and a response where the end
token follows. Given the log-probs of the next token at each node, everything about the model's responses is a sum over
nodes, for the process that is sampled with a limit of L + 1 new tokens: what is still without an end there is
*unfinished*.

Shapes: P prompts, N nodes, K words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lit_isdpo.policy.attention import autocast
from lit_isdpo.policy.logprob_model import LogProbModel

_CROWN = 100  # most tokens of a row that share its stem: larger wastes attention, smaller computes stems more often
_ROWS = 64  # rows of a forward: more no longer fit the processor's cache


@dataclass(frozen=True)
class ResponseTree:
    """The numbering of responses.

    >>> tree = ResponseTree(num_words=2, max_words=2)
    >>> len(tree), tree.level(2), tree.find([1, 0])
    (7, slice(3, 7, None), 5)
    >>> tree.words.tolist()
    [[-1, -1], [0, -1], [1, -1], [0, 0], [0, 1], [1, 0], [1, 1]]

    Args:
        num_words: K, at least 2.
        max_words: L, words of the longest response.
    """

    num_words: int
    max_words: int

    def __len__(self) -> int:
        return self._start(self.max_words + 1)

    def level(self, length: int) -> slice:
        """The nodes of ``length`` words."""
        return slice(self._start(length), self._start(length + 1))

    def find(self, word_ids: Sequence[int]) -> int:
        """The node of a response of at most ``max_words`` words."""
        assert len(word_ids) <= self.max_words
        node = 0
        for word in word_ids:
            node = self.num_words * node + 1 + word
        return node

    @cached_property
    def lengths(self) -> Tensor:
        """``(N,)`` words of each response."""
        return (self.words >= 0).sum(dim=1)

    @cached_property
    def words(self) -> Tensor:
        """``(N, L)`` the words of each response, -1 after its last."""
        words = torch.full((len(self), self.max_words), -1)
        for length in range(1, self.max_words + 1):
            nodes = words[self.level(length)]
            nodes[:, : length - 1] = words[self.level(length - 1), : length - 1].repeat_interleave(self.num_words, 0)
            nodes[:, length - 1] = torch.arange(self.num_words).repeat(len(nodes) // self.num_words)
        return words

    def _start(self, length: int) -> int:
        return int((self.num_words**length - 1) // (self.num_words - 1))


@dataclass(frozen=True)
class ResponseDistribution:
    """What a model says about every response to P prompts.

    Attributes:
        tree: the numbering of the N nodes.
        next_logps: ``(P, N, K + 1)`` log-probs of the next token at each node, the end token last; float64, nats.
    """

    tree: ResponseTree
    next_logps: Tensor

    @cached_property
    def prefix_logps(self) -> Tensor:
        """``(P, N)`` log-prob that a response begins with the node's words."""
        levels = [self.next_logps.new_zeros(self.next_logps.shape[0], 1)]
        for length in range(self.tree.max_words):
            continued = self.next_logps[:, self.tree.level(length), :-1]  # (P, K^length, K)
            levels.append((levels[-1][..., None] + continued).flatten(1))
        return torch.cat(levels, dim=1)

    @cached_property
    def logps(self) -> Tensor:
        """``(P, N)`` log-prob of each response, its end token included."""
        return self.prefix_logps + self.next_logps[..., -1]

    @cached_property
    def longer(self) -> Tensor:
        """``(P, K^L)`` probability that a response begins with the words of each deepest node, and goes on behind."""
        deepest = self.tree.level(self.tree.max_words)
        going_on = self.next_logps[:, deepest, :-1].logsumexp(dim=2)
        return (self.prefix_logps[:, deepest] + going_on).exp()

    @property
    def unfinished(self) -> Tensor:
        """``(P,)`` probability that no end token is among the first ``max_words + 1`` tokens."""
        return self.longer.sum(dim=1)

    @property
    def outcomes(self) -> Tensor:
        """``(P, N + K^L)`` probability of each finished response, and of going on behind each deepest node."""
        return torch.cat([self.logps.exp(), self.longer], dim=1)

    def expectation(self, values: Tensor, longer: float | Tensor) -> Tensor:
        """``(P,)`` mean of a number that each response has.

        Args:
            values: ``(N,)`` or ``(P, N)``, of the node as a finished response.
            longer: of the responses that go on behind a deepest node: one number, or ``(K^L,)`` or ``(P, K^L)``.
        """
        return (self.logps.exp() * values).sum(dim=1) + (self.longer * longer).sum(dim=1)

    def kl(self, reference: "ResponseDistribution") -> Tensor:
        """``(P,)`` KL(self || reference) in nats, of responses stopped at ``max_words + 1`` tokens.

        By the chain rule the sum over nodes of the probability to come there times the KL of the next token: the
        expectation of the Rao-Blackwell estimator (arXiv 2504.10637).
        """
        next_kl = (self.next_logps.exp() * (self.next_logps - reference.next_logps)).sum(dim=2)  # (P, N)
        return (self.prefix_logps.exp() * next_kl).sum(dim=1)


@torch.no_grad()
def enumerate_responses(
    model: LogProbModel, prompts: Sequence[Sequence[int]], tree: ResponseTree
) -> ResponseDistribution:
    """Asks the model for the next token at every node.

    A row of the batch is ``[prompt | stem | crown]``: a stem of words, and below it the whole tree of the last few
    levels, in which a token attends to its own ancestors alone. So nearly every token of a forward is a node of its
    own; a key-value cache would hold 46,656 copies of the prompt instead. The mask is additive, because eager
    attention gets a boolean one silently wrong.

    Args:
        model: with a vocabulary of the tree's words and the end token. What pads it behind these is left out, as it is
            where responses are sampled.
        prompts: token ids of P prompts.
        tree: the responses.

    Returns:
        The distribution, on the CPU.
    """
    num_words, device = tree.num_words, model.model.device
    assert model.vocabulary_size >= num_words + 1
    depth = max(d for d in range(1, tree.max_words + 1) if d == 1 or len(ResponseTree(num_words, d)) - 1 <= _CROWN)
    stem_length = tree.max_words - depth
    crown = ResponseTree(num_words, depth)
    crown_words = (torch.arange(len(crown) - 1) % num_words).to(device)  # nodes 1, 2, ...: the root is the stem's end
    stems = tree.words[tree.level(stem_length), :stem_length].to(device)  # (R, S)
    next_logps = []
    for prompt in prompts:
        ids = torch.tensor(prompt, device=device)
        trunk = len(prompt) + stem_length
        positions = torch.cat([torch.arange(trunk), trunk - 1 + crown.lengths[1:]]).to(device)
        mask = _crown_mask(crown, trunk).to(device)
        rows = []
        for some in stems.split(_ROWS):
            input_ids = torch.cat(
                [ids.expand(len(some), -1), some, crown_words.expand(len(some), -1)], dim=1
            )  # (rows, trunk + crown)
            with autocast(device, model.compute_dtype):
                output = model.model.base_model(
                    input_ids=input_ids,
                    attention_mask=mask.expand(len(some), 1, -1, -1),
                    position_ids=positions.expand(len(some), -1),
                    use_cache=False,
                )
            logits = model.head(output.last_hidden_state[:, len(prompt) - 1 :])[..., : num_words + 1]
            rows.append(logits.double().log_softmax(dim=2).cpu())
        next_logps.append(_in_order_of_nodes(torch.cat(rows), stem_length, crown))
    return ResponseDistribution(tree, torch.stack(next_logps))


def _crown_mask(crown: ResponseTree, trunk: int) -> Tensor:
    """``(1, 1, T, T)`` additive: the trunk is causal, a node of the crown sees the trunk, its ancestors and itself."""
    length = trunk + len(crown) - 1
    ancestors = torch.eye(len(crown), dtype=torch.bool)
    for node in range(1, len(crown)):
        ancestors[node] |= ancestors[(node - 1) // crown.num_words]
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    sees[trunk:, trunk:] = ancestors[1:, 1:]
    return torch.zeros(length, length).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]


def _in_order_of_nodes(rows: Tensor, stem_length: int, crown: ResponseTree) -> Tensor:
    """``(R, S + crown, V) -> (N, V)``; a node on several stems is taken from the first."""
    levels = [rows[:: crown.num_words ** (stem_length - length), length] for length in range(stem_length + 1)]
    for length in range(1, crown.max_words + 1):
        nodes = crown.level(length)
        levels.append(rows[:, stem_length + nodes.start : stem_length + nodes.stop].flatten(0, 1))
    return torch.cat(levels)
