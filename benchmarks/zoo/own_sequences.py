"""Sequence models as users write them: packed sequences, loops over time, tied heads, bare parameters, experts."""

import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16, padding_idx=0)
        self.rnn = nn.LSTM(16, 24, num_layers=2, batch_first=True, bidirectional=True, dropout=0.1)
        self.out = nn.Linear(48, 7)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(tokens), lengths, batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return F.log_softmax(self.out(states), -1)


class GruSeq2Seq(nn.Module):
    """Attention over encoder states, a GRU cell in a loop over the target's length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder, self.cell = nn.Embedding(50, 16), nn.GRU(16, 24, batch_first=True), nn.GRUCell(40, 24)
        self.out = nn.Linear(24, 50)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, h = self.encoder(self.embed(source))
        h, steps = h[0], []
        for t in range(target.size(1)):
            weights = torch.softmax(torch.einsum("bld,bd->bl", memory, h), -1)
            context = torch.bmm(weights.unsqueeze(1), memory).squeeze(1)
            h = self.cell(torch.cat((self.embed(target[:, t]), context), -1), h)
            steps.append(self.out(h))
        return torch.stack(steps, 1)


class PositionalEncoding(nn.Module):
    def __init__(self, d: int, length: int = 64) -> None:
        super().__init__()
        position = torch.arange(length).unsqueeze(1)
        term = torch.exp(torch.arange(0, d, 2) * (-math.log(10000.0) / d))
        pe = torch.zeros(length, 1, d)
        pe[:, 0, 0::2], pe[:, 0, 1::2] = torch.sin(position * term), torch.cos(position * term)
        self.register_buffer("pe", pe)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x + self.pe[: x.size(0)])


class LanguageModel(nn.Module):
    """The transformer of PyTorch's tutorial: mask made inside, encoder layers, tied head."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.d = d
        self.embed, self.position = nn.Embedding(99, d), PositionalEncoding(d)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 4, 64, 0.1), 2)
        self.head = nn.Linear(d, 99)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.position(self.embed(tokens) * math.sqrt(self.d))
        mask = nn.Transformer.generate_square_subsequent_mask(len(tokens)).to(x.device)
        return self.head(self.encoder(x, mask))


class NanoGPT(nn.Module):
    """Causal attention in nanoGPT's manner, with a loss if targets are given."""

    class Block(nn.Module):
        def __init__(self, d: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
            self.c_attn, self.c_proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
            self.mlp = nn.ModuleDict({"fc": nn.Linear(d, 4 * d), "proj": nn.Linear(4 * d, d)})

        def forward(self, x: Tensor) -> Tensor:
            b, t, c = x.size()
            q, k, v = self.c_attn(self.ln_1(x)).split(c, dim=2)
            q, k, v = (part.view(b, t, self.heads, c // self.heads).transpose(1, 2) for part in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0, is_causal=True)
            x = x + self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))
            return x + self.mlp["proj"](F.gelu(self.mlp["fc"](self.ln_2(x))))

    def __init__(self, d: int = 32, length: int = 32) -> None:
        super().__init__()
        self.length = length
        self.wte, self.wpe = nn.Embedding(99, d), nn.Embedding(length, d)
        self.blocks = nn.ModuleList(self.Block(d, 4) for _ in range(2))
        self.ln_f, self.lm_head = nn.LayerNorm(d), nn.Linear(d, 99, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        _, t = idx.size()
        assert t <= self.length, f"sequence of {t} is longer than {self.length}"
        x = self.wte(idx) + self.wpe(torch.arange(0, t, dtype=torch.long, device=idx.device))
        for block in self.blocks:
            x = block(x)
        x = self.ln_f(x)
        if targets is not None:
            logits = self.lm_head(x)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        else:
            logits, loss = self.lm_head(x[:, [-1], :]), None
        return logits, loss


class WaveNet(nn.Module):
    """Weight-normed dilated convolutions with gates and skips."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.start = norm(nn.Conv1d(1, width, 1))
        self.gates = nn.ModuleList(norm(nn.Conv1d(width, 2 * width, 3, dilation=2**i)) for i in range(4))
        self.skips = nn.ModuleList(norm(nn.Conv1d(width, 2 * width, 1)) for _ in range(4))
        self.end = nn.Sequential(nn.ReLU(), norm(nn.Conv1d(width, 8, 1)))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.start(x), 0
        for i, (gate, skip) in enumerate(zip(self.gates, self.skips)):
            a, b = gate(F.pad(x, (2 * 2**i, 0))).chunk(2, 1)
            residual, out = skip(torch.tanh(a) * torch.sigmoid(b)).chunk(2, 1)
            x, total = (x + residual) * 0.7071, total + out
        return self.end(total)


class Router(nn.Module):
    """Mixture of experts: which expert runs depends on values."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.gate = nn.Linear(d, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(d, 32), nn.GELU(), nn.Linear(32, d)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == i)
            if rows.numel() > 0:
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out


class GraphConvolution(nn.Module):
    """Weights as bare parameters, products as @ and torch.mm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(12, 16) * 0.2)
        self.second = nn.Parameter(torch.randn(16, 4) * 0.2)
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = F.dropout(F.relu(adjacency @ (x @ self.first)), 0.2, self.training)
        return torch.mm(adjacency, torch.mm(x, self.second)) + self.bias


class Recommender(nn.Module):
    """Embedding bags, a list of inputs, interactions as bmm."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(20, 8, mode="sum") for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(14, 16), nn.ReLU(), nn.Linear(16, 1), nn.Sigmoid())
        self.pairs = [(i, j) for i in range(4) for j in range(i)]

    def forward(self, dense: Tensor, sparse: list[Tensor]) -> Tensor:
        x = self.bottom(dense)
        rows = torch.stack([x, *(table(ids) for table, ids in zip(self.tables, sparse))], 1)
        products = torch.bmm(rows, rows.transpose(1, 2))
        picked = torch.stack([products[:, i, j] for i, j in self.pairs], 1)
        return self.top(torch.cat((x, picked), 1))


class TeacherForcing(nn.Module):
    """An encoder and a decoder cell that sees the truth or its own words, by chance, as in PyTorch's tutorial."""

    def __init__(self, words: int = 30, d: int = 16) -> None:
        super().__init__()
        self.embed, self.encoder = nn.Embedding(words, d), nn.GRU(d, d, batch_first=True)
        self.decoder, self.out = nn.GRUCell(d, d), nn.Linear(d, words)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, h = self.encoder(self.embed(source))
        h, word, steps = h[0], target[:, 0], []
        for t in range(1, target.shape[1]):
            h = self.decoder(self.embed(word), h)
            steps.append(self.out(h))
            word = target[:, t] if self.training and random.random() < 0.5 else steps[-1].argmax(1)
        return torch.stack(steps, 1)


class MessagePassing(nn.Module):
    """Edges as pairs of indices, softmax over neighbours, sums by index_add, graphs pooled by what a tensor holds."""

    def __init__(self, d: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"own": nn.Linear(d, d), "message": nn.Linear(2 * d, d)}) for _ in range(2))
        self.norm, self.attention, self.out = nn.BatchNorm1d(d), nn.Linear(d, 1), nn.Linear(d, 3)

    def forward(self, x: Tensor, edges: Tensor, graphs: Tensor) -> Tensor:
        source, target = edges
        for layer in self.layers:
            message = layer["message"](torch.cat((x[source], x[target]), -1))
            weight = self.attention(message).exp()
            total = torch.zeros(x.size(0), 1, device=x.device).index_add_(0, target, weight)
            message = message * (weight / (total[target] + 1e-6))
            x = F.relu(self.norm(layer["own"](x) + torch.zeros_like(x).index_add(0, target, message)))
        return self.out(torch.zeros(int(graphs.max()) + 1, x.size(1), device=x.device).index_add(0, graphs, x))
