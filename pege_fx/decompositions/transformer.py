"""torch's transformer layers written out: no fast path behind the graph's back, every product an edge of the graph.

They expect what the fast path expects: batched input. Same parameters, same results as the originals.
"""

from typing import Any

from torch import Tensor, nn


class ExplicitEncoderLayer(nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer`` without its fast path."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask}
            y: Tensor = self.dropout1(self.self_attn(x, x, x, need_weights=False, **masks)[0])
            return y

        def feed(x: Tensor) -> Tensor:
            y: Tensor = self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))
            return y

        if self.norm_first:
            x = src + attend(self.norm1(src))
            return x + feed(self.norm2(x))
        x = self.norm1(src + attend(src))
        out: Tensor = self.norm2(x + feed(x))
        return out


class ExplicitDecoderLayer(nn.TransformerDecoderLayer):
    """``nn.TransformerDecoderLayer``, whose attention is explicit too."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            masks = {"attn_mask": tgt_mask, "key_padding_mask": tgt_key_padding_mask}
            y: Tensor = self.dropout1(self.self_attn(x, x, x, need_weights=False, **masks)[0])
            return y

        def look(x: Tensor) -> Tensor:
            masks = {"attn_mask": memory_mask, "key_padding_mask": memory_key_padding_mask}
            y: Tensor = self.dropout2(self.multihead_attn(x, memory, memory, need_weights=False, **masks)[0])
            return y

        def feed(x: Tensor) -> Tensor:
            y: Tensor = self.dropout3(self.linear2(self.dropout(self.activation(self.linear1(x)))))
            return y

        if self.norm_first:
            x = tgt + attend(self.norm1(tgt))
            x = x + look(self.norm2(x))
            return x + feed(self.norm3(x))
        x = self.norm1(tgt + attend(tgt))
        x = self.norm2(x + look(x))
        out: Tensor = self.norm3(x + feed(x))
        return out


class ExplicitEncoder(nn.TransformerEncoder):
    """``nn.TransformerEncoder`` without nested tensors."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        x: Any = src
        for layer in self.layers:
            x = layer(x, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        out: Tensor = x if self.norm is None else self.norm(x)
        return out


class ExplicitDecoder(nn.TransformerDecoder):
    """``nn.TransformerDecoder``, which a tracer can follow."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        x: Any = tgt
        masks = {
            "tgt_mask": tgt_mask,
            "memory_mask": memory_mask,
            "tgt_key_padding_mask": tgt_key_padding_mask,
            "memory_key_padding_mask": memory_key_padding_mask,
        }
        for layer in self.layers:
            x = layer(x, memory, **masks)
        out: Tensor = x if self.norm is None else self.norm(x)
        return out


class ExplicitTransformer(nn.Transformer):
    """``nn.Transformer`` without its checks of sizes."""

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        memory = self.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask)
        out: Tensor = self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
        )
        return out


EXPLICIT_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.TransformerEncoderLayer: ExplicitEncoderLayer,
    nn.TransformerDecoderLayer: ExplicitDecoderLayer,
    nn.TransformerEncoder: ExplicitEncoder,
    nn.TransformerDecoder: ExplicitDecoder,
    nn.Transformer: ExplicitTransformer,
}
