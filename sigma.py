r"""SIGMA: Sinkhorn-Guided Masked Video Modeling (Salehi et al., ECCV 2024, arXiv 2407.15447).

This is the paper's method section as code. It needs PyTorch (2.6 or later) and nothing else.

VideoMAE hides 90% of a clip and learns by predicting the hidden pixels. SIGMA predicts features instead: the
video model Ψ sees only what is left visible and predicts a feature for every hidden tube (defined below).
The projection network φ sees the hidden tubes and computes the features to predict. If the two were simply
pulled together, both would learn to output one constant: a perfect loss, and no knowledge. So both features
are scored against K shared prototypes, and Sinkhorn turns the scores into cluster assignments that use all
prototypes about equally. Each network predicts the other's, and can only do so by telling tubes apart.

For two clips and size "base", with 2 x 1408 = 2816 masked tubes and 3000 prototypes C:

  clip 2x3x16x224x224 -> tubes 2x1568x1536
   +- 160 visible -> encoder 2x160x768 -> linear 2x160x384, plus 1408 mask tokens -> decoder -> x^Ψ 2816x256
   |
   |   x^Ψ to length 1 -> scores x̃^Ψ = x^Ψ Cᵀ 2816x3000 -> Sinkhorn -> q^Ψ, the target of x̃^φ --+
   |                                                                                            +-> loss
   |   x^φ to length 1 -> scores x̃^φ = x^φ Cᵀ 2816x3000 -> Sinkhorn -> q^φ, the target of x̃^Ψ --+
   |
   +- 1408 masked -> projection network φ -------------------------------------------------> x^φ 2816x256

Start with `SIGMA.forward`, then `sigma_loss` and `sinkhorn`. The networks below are ordinary ViTs. To use it:

    model = SIGMA(size="base", target="mlp", num_prototypes=64)  # the paper's 3000 needs hundreds of clips
    video = torch.randn(2, 3, 16, 224, 224)              # two clips, ImageNet-normalised
    mask = tube_mask(batch=2, steps=8, patches=14 * 14)  # 16 frames are 8 steps of two frames
    loss, stats = model(video, mask)
    loss.backward()

A *tube* is one token: 2 frames x 16 x 16 pixels (also called tubelet). A *step* is two frames of time.
*Tube masking* hides the same patches of the picture at all times. Symbols, as in the paper:

  Ψ, φ       video model (encoder and decoder), projection network
  x^Ψ, x^φ   their features of the masked tubes
  C          the K learned prototypes, one per row, of unit length
  x̃          scores: dot products of a unit-length feature with all prototypes
  Q, q       Sinkhorn's plan [N, K] for all N masked tubes (in the paper [K, N]); q = N·Q, rows sum to 1
  u, v       one factor per tube, one per prototype: q_ik = u_i exp(x̃_ik/ε) v_k
  ε, τ       temperatures: of the assignments (0.05; the paper's 1/λ) and of the predictions (0.1)

Shapes: B clips, T frames, H x W pixels; S tubes in a clip, V visible and M masked; N = B·M; P values in a
tube; D, d, E widths of encoder, decoder and features; n any count. "Pastes with" in a docstring lists what a
piece needs apart from the three imports below.

Differences between the paper's text, the authors' code (which made their results) and this file:
                 text               authors' code                  here
  assignments    soft               hard: argmax of q              hard, or assignment="soft"
  K              4000 is best       3000                           3000
  C learns from  not said           φ's loss term only             φ's loss term only
  Sinkhorn       -                  rescales the N x K matrix      same iterations, kept as vectors u and v
  DINO as φ      several variants   B/16, in float32               B/16 or S/16, under training's autocast
"""
import torch
import torch.nn.functional as F
from torch import nn

TUBELET = 2  # frames in a tube
PROJECTION = (1024, 1024, 512, 256)  # widths of φ's layers; the last one is E
SIZES = {  # patch: a tube's side in pixels (`patches` elsewhere is a count); "tiny" is not from the paper
    "tiny": dict(patch=8, width=128, depth=4, heads=2, decoder_width=64, decoder_depth=2, decoder_heads=1,
                 projection=(256, 64)),
    "small": dict(patch=16, width=384, depth=12, heads=6, decoder_width=192, decoder_depth=4, decoder_heads=3,
                  projection=PROJECTION),
    "base": dict(patch=16, width=768, depth=12, heads=12, decoder_width=384, decoder_depth=4, decoder_heads=6,
                 projection=PROJECTION),
    "large": dict(patch=16, width=1024, depth=24, heads=16, decoder_width=512, decoder_depth=4,
                  decoder_heads=8, projection=PROJECTION),
    "huge": dict(patch=16, width=1280, depth=32, heads=16, decoder_width=640, decoder_depth=4,
                 decoder_heads=8, projection=PROJECTION),
}
TEACHERS = {"vits16": dict(width=384, depth=12, heads=6),  # DINO v1's image networks; their width is E
            "vitb16": dict(width=768, depth=12, heads=12)}


# ============ tubes and mask (Sec. 3.1) ============
def tube_mask(batch, steps, patches, ratio=0.9, device=None, generator=None):
    """Tube masking: each clip hides its own random patches, the same ones at all times, so that what does not
    move cannot be copied from another frame.

    steps: frames / 2, because a tube is two frames long: 8 for 16 frames. patches: tubes per step, 14 · 14
    for 224 pixels. generator: makes the mask repeatable. device: leave it on the CPU for SIGMA, as counting
    masked tubes on a GPU means waiting for it. Returns bool [batch, steps * patches], one step after the
    other, True where masked: exactly int(ratio * patches) per step."""
    noise_device = device if generator is None else generator.device
    noise = torch.rand(batch, patches, device=noise_device, generator=generator)
    # argsort of noise is a random permutation of 0 ... patches - 1; patches with a low value are masked.
    permutation = noise.argsort(dim=1)
    masked = permutation < int(ratio * patches)  # [batch, patches]
    return masked.to(device).repeat(1, steps)  # [batch, steps * patches]


def split_mask(mask, device):
    """Mask [B, S] -> indices of the visible tubes [B, V] and of the masked tubes [B, M], on `device`.

    Picking by index, unlike picking by a boolean mask, has a shape known in advance: nothing waits for the
    GPU. ValueError unless all clips have equally many masked tubes, at least one and fewer than all."""
    counts = mask.sum(dim=1).tolist()
    num_masked, num_tubes = counts[0], mask.shape[1]
    if len(set(counts)) > 1 or num_masked == 0 or num_masked == num_tubes:
        raise ValueError("all clips need equally many masked tubes, at least one and fewer than all; "
                         f"this mask has {sorted(set(counts))} of {num_tubes}")
    # A stable sort puts the visible tubes (0) before the masked ones (1) and otherwise keeps their order.
    order = mask.to(device, non_blocking=True).byte().argsort(dim=1, stable=True)  # [B, S]
    return order[:, :num_tubes - num_masked], order[:, num_tubes - num_masked:]


def take_tubes(x, index):
    """Picks tubes by index: x [B, S, ...], index [B, n] -> [B, n, ...]."""
    clip = torch.arange(len(x), device=x.device)[:, None]  # [B, 1]
    return x[clip, index]


def patchify(video, patch):
    """Cuts clips [B, 3, T, H, W] into tubes [B, S, P], P = 2 · patch · patch · 3.

    Tubes are ordered by time, row, column; the values in a tube by frame, row, column, colour, as in the
    authors' code. Pastes with: TUBELET."""
    B, _, T, H, W = video.shape
    x = video.reshape(B, 3, T // TUBELET, TUBELET, H // patch, patch, W // patch, patch)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1)  # [B, T/2, H/patch, W/patch, 2, patch, patch, 3]
    return x.reshape(B, -1, TUBELET * patch * patch * 3)


def normalize_tubes(tubes):
    """Standardises each colour of each tube in [..., P]: the input of the MLP φ, and the target of VideoMAE.

    The authors compute (x - mean) / (deviation + 1e-6) on pixels in [0, 1]. Here pixels are
    ImageNet-normalised, that is divided by about 0.226, and so is the 1e-6: the same up to rounding."""
    x = tubes.unflatten(-1, (-1, 3)).float()  # [..., P / 3, 3]
    # Subtracting the first pixel makes one-coloured tubes exactly 0; a rounded mean would leave noise.
    x = x - x[..., :1, :]
    deviation, mean = torch.std_mean(x, dim=-2, keepdim=True)  # unbiased
    x = (x - mean) / (deviation + 1e-6 / 0.226)
    return x.flatten(-2)


# ============ Sinkhorn and the loss (Sec. 3.3) ============
def all_reduce(x, op="SUM"):
    """Sum (or "MAX") of x over all processes, in place; x itself where the run is not distributed. All
    processes must call this together, and likewise every function that uses it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x, op=getattr(torch.distributed.ReduceOp, op))
    return x


@torch.no_grad()
def sinkhorn(scores, eps=0.05, iterations=10):
    """Turns scores x̃ [N, K] into cluster assignments q [N, K] that use all prototypes equally.

    q is a softmax of x̃/ε + log v, where v is small for popular prototypes: each tube chooses what it likes,
    but what everyone likes has become expensive. For example, four tubes that all prefer the first prototype:

    >>> scores = torch.tensor([[0.9, 0.5], [0.8, 0.5], [0.7, 0.5], [0.6, 0.5]])
    >>> [round(share, 2) for share in (scores / 0.1).softmax(dim=1)[:, 0].tolist()]
    [0.98, 0.95, 0.88, 0.73]
    >>> [round(share, 2) for share in sinkhorn(scores, eps=0.1)[:, 0].tolist()]
    [0.82, 0.62, 0.38, 0.18]

    With softmax all choose prototype 1, with Sinkhorn the two that like it most: columns sum to N/K = 2. This
    is the paper's optimal transport with log X = x̃ (its KL term is a constant minus the entropy):

        max over Q ≥ 0 of  Σ_ik Q_ik x̃_ik - ε Σ_ik Q_ik log Q_ik   where  Σ_k Q_ik = 1/N, Σ_i Q_ik = 1/K

    Tubes ship 1/N each to prototypes that take 1/K each. With Lagrange multipliers α_i, β_k the derivative
    x̃_ik - ε (log Q_ik + 1) - α_i - β_k must be 0. Solved for q = N·Q: q_ik = u_i exp(x̃_ik/ε) v_k, with
    u_i ∝ exp(-α_i/ε) and v_k ∝ exp(-β_k/ε). Sinkhorn-Knopp starts at u = 1 and alternates: v to make the
    columns even, then u to make the rows sum to 1.

    scores: cosines of features and prototypes, any floating dtype. In a distributed run pass this process's
    rows ([N] in the code). The formula's N is over all processes, which must call this together.
    eps: ε; a larger one spreads each tube over more prototypes.
    iterations: the authors take 10, before it converges: columns are roughly even. 0 is a plain softmax.
    Returns q, float32; rows sum to 1; finite for finite scores. Pastes with: all_reduce, rescaled_exp."""
    device_type = "cuda" if scores.is_cuda else "cpu"
    with torch.autocast(device_type, enabled=False):  # half precision is too coarse for u and v
        if iterations == 0:
            return (scores.float() / eps).softmax(dim=1)
        exp_scores, u = rescaled_exp(scores, eps)  # in place of exp(x̃/ε) [N, K] and u = 1 [N]: the same q
        for _ in range(iterations):
            column_sums = all_reduce(exp_scores.T @ u)  # [K]
            v = 1 / column_sums  # every prototype is used equally
            # u cancels any scale of v, so 1/K is left out, and the largest v is set to 1. The clamp keeps v
            # above 0 where scores are far beyond cosines.
            v = (v / v.amax()).clamp(min=1e-30)
            u = 1 / (exp_scores @ v)  # [N]: every row of q sums to 1
        return exp_scores.mul_(v).mul_(u[:, None])  # u_i exp(x̃_ik/ε) v_k


def rescaled_exp(scores, eps):
    """exp(x̃/ε) [N, K] with columns divided by b_k, then rows by a_i; and a [N], at which u has to start.

    Not needed at the authors' ε, where exp(x̃/ε) is at most e^33; at ε = 0.01 it is up to e^100, too much for
    float32. b_k is the largest entry of the column, a_i then that of the row: every row and column holds a 1,
    and no sum in `sinkhorn` is 0. (One divisor for all would leave only zeros in the row of a tube far from
    all prototypes.) q stays: with u = a the first column sums are the plain ones over b_k, so each v is b_k
    times the plain v and the next u is a_i times the plain u. Both cancel in u_i · entry · v_k. From u = 1,
    ten iterations would give another q. The code has the logarithms of a and b. Pastes with: all_reduce."""
    logits = (scores.float() / eps).clamp_(-1e38, 1e38)  # x̃/ε, clamped as inf - inf is NaN
    column_max = all_reduce(logits.amax(dim=0), "MAX")  # [K]; a column extends over all processes
    logits.sub_(column_max)  # before the exp: this divides the column
    # A row that held a column's largest entry now has a 0 there, its maximum: that column keeps its 1.
    row_max = logits.amax(dim=1)  # [N]
    logits.sub_(row_max[:, None])
    return logits.exp_(), row_max.exp()


@torch.compiler.disable  # not every version can trace a write to .data
def set_to_unit_length(prototypes):
    """Scales each prototype of C [K, E] to length 1, in place, as the authors do before each forward pass.
    Written through .data, since autograd would otherwise fail in backward after two forward passes."""
    prototypes.data.copy_(F.normalize(prototypes.data, dim=1))


def sigma_loss(x_psi, x_phi, prototypes, eps=0.05, iterations=10, temperature=0.1, assignment="hard"):
    """Each network predicts the cluster assignments made from the other's features:

        L = 1/N Σ_i [ CE(x̃_i^φ/τ, q_i^Ψ) + CE(x̃_i^Ψ/τ, q_i^φ) ],   CE(s, q) = -Σ_k q_k log softmax(s)_k

    x_psi, x_phi: x^Ψ and x^φ [N, E], normalised here. prototypes: C [K, E], a float32 Parameter, set to unit
    length in place. Under DDP it must belong to the wrapped module, whose forward must call sigma_loss.
    A batch, over all processes, should hold many tubes for each prototype (the authors: 300); else lower K.
    eps, iterations: see `sinkhorn` (the authors: ε = 0.05, or 0.03 for ViT-B on SSv2). temperature: τ.
    assignment: "soft" takes q as the target, as the text does; "hard" its argmax, as the authors' code does.
    Early in training q is nearly flat, although ε < τ sharpens it, and teaches little; a one-hot target is
    never flat. Through v the argmax favours rarely used prototypes, but it need not use all equally.
    Returns the loss and a dict for `loss_statistics`; drop the dict after use, it holds an [N, K] tensor.
    ValueError for other shapes. Pastes with: all_reduce, rescaled_exp, set_to_unit_length, sinkhorn."""
    if x_psi.ndim != 2 or x_psi.shape != x_phi.shape or x_psi.shape[1] != prototypes.shape[1]:
        raise ValueError("features must be [N, E], one row per masked tube, and prototypes [K, E]; given are "
                         f"{list(x_psi.shape)}, {list(x_phi.shape)} and {list(prototypes.shape)}")
    if assignment not in ("hard", "soft"):
        raise ValueError(f"assignment {assignment!r} is not one of: hard, soft")

    # 1. Scores, -1 to 1, in float32: with the authors' float16 one assignment in 300 differs, in bfloat16 3%.
    set_to_unit_length(prototypes)
    unit_psi = F.normalize(x_psi.float())  # [N, E], rows of length 1
    unit_phi = F.normalize(x_phi.float())  # [N, E]
    device_type = "cuda" if x_psi.is_cuda else "cpu"
    with torch.autocast(device_type, enabled=False):
        scores_psi = unit_psi @ prototypes.detach().T  # x̃^Ψ [N, K]; C learns from φ's term only
        scores_phi = unit_phi @ prototypes.T  # x̃^φ [N, K]

    # 2. Assignments. No gradient flows through them.
    q_psi = sinkhorn(scores_psi, eps, iterations)  # [N, K]
    q_phi = sinkhorn(scores_phi, eps, iterations)  # [N, K]
    hard_psi = q_psi.argmax(dim=1)  # [N]
    hard_phi = q_phi.argmax(dim=1)  # [N]

    # 3. Predictions, crosswise. F.cross_entropy takes probabilities [N, K] or class indices [N] as targets.
    target_for_phi, target_for_psi = q_psi, q_phi
    if assignment == "hard":
        target_for_phi, target_for_psi = hard_psi, hard_phi
    loss_projection = F.cross_entropy(scores_phi / temperature, target_for_phi)  # CE(x̃^φ/τ, q^Ψ)
    loss_video = F.cross_entropy(scores_psi / temperature, target_for_psi)  # CE(x̃^Ψ/τ, q^φ)
    parts = {"loss_video": loss_video.detach(), "loss_projection": loss_projection.detach(),
             "unit_phi": unit_phi.detach(), "scores_phi": scores_phi.detach(),
             "hard_psi": hard_psi, "hard_phi": hard_phi}
    return loss_video + loss_projection, parts


@torch.no_grad()
def loss_statistics(parts):
    """Scalars to watch, from the dict of `sigma_loss`. This process's loss terms and agreement, the share of
    tubes with argmax q^Ψ = argmax q^φ; perplexity and spread of φ over all processes.
    Pastes with: all_reduce, perplexity, spread."""
    alike = parts["hard_psi"] == parts["hard_phi"]  # [N]
    return {"loss_video": parts["loss_video"], "loss_projection": parts["loss_projection"],
            "agreement": alike.float().mean(), "perplexity": perplexity(parts["scores_phi"]),
            "spread": spread(parts["unit_phi"])}


@torch.no_grad()
def perplexity(scores):
    """How many prototypes are in use: exp(entropy) of how often each has the highest score x̃ [N, K]. It
    takes scores and not q, since Sinkhorn makes q even. Pastes with: all_reduce."""
    best = scores.argmax(dim=1)  # [N]
    ones = torch.ones(len(best), device=scores.device)
    counts = torch.zeros(scores.shape[1], device=scores.device)
    counts = all_reduce(counts.index_add_(0, best, ones))  # [K]; torch.bincount would wait for the GPU
    share = counts / counts.sum()
    return torch.special.entr(share).sum().exp()  # entr(p) = -p log p


@torch.no_grad()
def spread(unit):
    """1 - length of the mean of unit features [N, E]; near 0 means collapse. Pastes with: all_reduce."""
    total = all_reduce(unit.sum(dim=0))  # [E]
    count = all_reduce(unit.new_full((), len(unit)))
    return 1 - (total / count).norm()


# ============ SIGMA (Fig. 2) ============
class SIGMA(nn.Module):
    """Video model Ψ, projection network φ and prototypes C, trained together.

    size: "tiny", "small", "base", "large" or "huge". frames, image_size: of the clips it will be given.
    target: what φ is. "mlp": a small network trained with Ψ; "dino": a frozen image network, so that only C
    learns from φ's loss term; "pixel": no network, but the pixels, standardised.
    loss: "sigma", or "l2", which is VideoMAE with "pixel" and collapses with "mlp".
    num_prototypes: K. eps, iterations, temperature, assignment: see `sigma_loss`.
    teacher: the DINO network, "vitb16" or "vits16". It is random until you load DINO's public file:
    model.teacher.load_state_dict(torch.load(file)). drop_path, recompute: see `Encoder`.

    state_dict() has the names and shapes of the authors' checkpoints, without the frozen teacher. ValueError
    for impossible settings. Pastes with: this whole file."""
    def __init__(self, size="base", target="mlp", loss="sigma", num_prototypes=3000, eps=0.05, iterations=10,
                 temperature=0.1, assignment="hard", teacher="vitb16", frames=16, image_size=224,
                 drop_path=0.0, recompute=False):
        super().__init__()
        check_settings(size, target, loss, num_prototypes, eps, iterations, temperature, assignment, teacher,
                       frames, image_size)
        self.target = target
        self.loss = loss
        self.eps = eps
        self.iterations = iterations
        self.temperature = temperature
        self.assignment = assignment
        self.frames, self.image_size = frames, image_size
        self.loss_fn = sigma_loss  # an attribute, so that a compiled version can take its place
        config = SIZES[size]
        self.patch = config["patch"]
        side = image_size // self.patch
        self.grid = (frames // TUBELET, side, side)  # tubes in time, height, width: 8 x 14 x 14
        self.num_tubes = self.grid[0] * side * side  # S
        tube_width = TUBELET * self.patch * self.patch * 3  # P
        projection = config["projection"]
        widths = {"mlp": projection[-1], "dino": TEACHERS[teacher]["width"], "pixel": tube_width}
        feature_width = widths[target]  # E
        self.encoder = Encoder(self.num_tubes, self.patch, config["width"], config["depth"], config["heads"],
                               drop_path, recompute)
        self.encoder_to_decoder = nn.Linear(config["width"], config["decoder_width"], bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config["decoder_width"]))
        self.decoder = Decoder(self.num_tubes, config["decoder_width"], config["decoder_depth"],
                               config["decoder_heads"], feature_width, recompute)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        if target == "mlp":
            self.head = projection_mlp(tube_width, projection)  # φ, called head in the authors' checkpoints
        if target == "dino":
            # φ is frozen and public, so checkpoint, optimizer and DDP need not know it. Unlike a usual
            # attribute, an entry in __dict__ does not register it as part of the model.
            self.__dict__["teacher"] = DinoViT(**TEACHERS[teacher]).requires_grad_(False)
        if loss == "sigma":
            self.prototypes = nn.Parameter(torch.randn(num_prototypes, feature_width))  # C [K, E]

    def forward(self, video, mask):
        """A training step's loss, and a dict of scalars to watch.

        video: [B, 3, T, H, W], ImageNet-normalised. mask: bool [B, S] from `tube_mask`; ValueError for other
        shapes. The dict is that of `loss_statistics`; with loss "l2" it holds only `spread`, with pixels
        nothing. The loss starts near 2·ln K and may rise, as its targets change: it measures no progress."""
        check_inputs(self, video, mask)
        visible, masked = split_mask(mask, video.device)  # [B, V], [B, M]
        tubes = patchify(video, self.patch)  # [B, S, P]
        tokens = self.encoder(take_tubes(tubes, visible), visible)  # [B, V, D]
        x_psi = self.forward_decoder(tokens, visible, masked)  # x^Ψ [B, M, E]
        x_phi = self.forward_target(video, tubes, masked)  # x^φ [B, M, E]
        return self.forward_loss(x_psi.flatten(0, 1), x_phi.flatten(0, 1))  # both [N, E], N = B·M

    def forward_decoder(self, tokens, visible, masked):
        """The rest of Ψ after the encoder: its tokens of the visible tubes [B, V, D] -> x^Ψ [B, M, E]."""
        seen = self.encoder_to_decoder(tokens) + self.decoder.positions[visible]  # [B, V, d]
        # All masked tubes start as the same learned token; only the position says which tube is asked for.
        asked = self.mask_token + self.decoder.positions[masked]  # [B, M, d]
        x = torch.cat([seen, asked], dim=1)  # [B, V + M, d]
        return self.decoder(x, masked.shape[1])

    def forward_target(self, video, tubes, index):
        """φ's features x^φ [B, n, E] of the tubes in `index`; taking the masked ones is the paper's "inverse
        masking". The MLP sees each tube by itself, DINO sees whole frames."""
        if self.target == "dino":
            return take_tubes(self.teacher_features(video), index)
        pixels = normalize_tubes(take_tubes(tubes, index))  # [B, n, P]
        if self.target == "pixel":
            return pixels
        return self.head(pixels)

    @torch.no_grad()
    def teacher_features(self, video):
        """DINO's features [B, S, E] of each tube's first frame, every channel standardised over the clip."""
        if not self.teacher.weights_loaded:
            import warnings  # Python shows this warning once
            warnings.warn("DINO's weights are random: load its public file into model.teacher")
        frames = video[:, :, ::TUBELET].transpose(1, 2).flatten(0, 1)  # [B · T/2, 3, H, W]
        if self.patch != 16:  # DINO's patch is 16 pixels: enlarge the frames so that one tube is one patch
            frames = F.interpolate(frames, scale_factor=16 / self.patch, mode="bilinear")
        # model.to(device) does not reach the hidden network, so it is moved here.
        self.teacher.to(video.device)
        x = self.teacher(frames).float()  # [B · T/2, patches, E]
        x = x.unflatten(0, (len(video), -1)).flatten(1, 2)  # [B, S, E]
        deviation, mean = torch.std_mean(x, dim=1, keepdim=True)  # unbiased
        return (x - mean) / (deviation + 1e-6)

    def forward_loss(self, x_psi, x_phi):
        """x^Ψ, x^φ [N, E] -> loss, dict of scalars."""
        if self.loss == "sigma":
            loss, parts = self.loss_fn(x_psi, x_phi, self.prototypes, self.eps, self.iterations,
                                       self.temperature, self.assignment)
            return loss, loss_statistics(parts)
        # 1/N Σ_i ‖x_i^φ - x_i^Ψ‖², also divided by E. Two constant networks reach 0: the collapse.
        loss = F.mse_loss(x_psi.float(), x_phi.float())
        if self.target == "pixel":
            return loss, {}
        return loss, {"spread": spread(F.normalize(x_phi.float(), dim=1))}

    def all_tubes(self, video):
        """The indices of all tubes, for each clip: [B, S]."""
        return torch.arange(self.num_tubes, device=video.device).expand(len(video), -1)

    def features(self, video):
        """The encoder's tokens of the whole clip, after its norm: [B, S, D]. To classify, average over S."""
        return self.encoder(patchify(video, self.patch), self.all_tubes(video))

    @torch.no_grad()
    def prototype_scores(self, video):
        """φ's scores x̃ of all tubes of the whole clip: [B, S, K]. ValueError without prototypes."""
        if self.loss != "sigma":
            raise ValueError("this model was trained with loss l2 and has no prototypes")
        x_phi = self.forward_target(video, patchify(video, self.patch), self.all_tubes(video))  # [B, S, E]
        return F.normalize(x_phi.float(), dim=2) @ F.normalize(self.prototypes, dim=1).T

    def assign(self, video):
        """The prototype with φ's highest score (no Sinkhorn) for every tube of the clip: int64 [B, S]."""
        return self.prototype_scores(video).argmax(dim=2)


# ============ the networks it is made of, as in every ViT ============
# If you know ViTs, only `Encoder.forward` has anything new.
class Encoder(nn.Module):
    """The encoder of Ψ, a ViT on the given tubes: tubes [B, n, P], their indices [B, n] -> tokens [B, n, D].

    A tube's values are in the order of `patchify`. drop_path: chance of skipping a branch, rising linearly
    from 0 to this over the blocks. recompute: see `run_blocks`.
    Pastes with: TUBELET, Attention, Block, init_linear, run_blocks, sincos_table."""
    def __init__(self, num_tubes, patch, width, depth, heads, drop_path=0.0, recompute=False):
        super().__init__()
        # A Conv3d only to match the checkpoint; without overlap it is the same Linear layer for every tube.
        size = (TUBELET, patch, patch)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, width, kernel_size=size, stride=size)})
        self.blocks = nn.ModuleList()
        for i in range(depth):
            rate = drop_path * i / max(1, depth - 1)
            self.blocks.append(Block(width, heads, drop_path=rate))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("positions", sincos_table(num_tubes, width), persistent=False)
        self.recompute = recompute
        self.blocks.apply(init_linear)  # the Conv3d keeps PyTorch's default, as in the authors' code

    def forward(self, tubes, index):
        # Only the given tubes are embedded; a convolution would embed the whole clip, ten times as many.
        proj = self.patch_embed["proj"]
        weight = proj.weight.permute(0, 2, 3, 4, 1).flatten(1)  # [D, P], in the order of patchify
        x = F.linear(tubes, weight, proj.bias)  # [B, n, D]
        x = x + self.positions[index]
        x = run_blocks(self.blocks, x, self.recompute)
        return self.norm(x)


class Decoder(nn.Module):
    """The decoder of Ψ, a smaller ViT: tokens [B, n, d] with positions added, masked ones last -> [B, M, E].
    Pastes with: Attention, Block, init_linear, run_blocks, sincos_table."""
    def __init__(self, num_tubes, width, depth, heads, feature_width, recompute=False):
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, feature_width)
        self.register_buffer("positions", sincos_table(num_tubes, width), persistent=False)
        self.recompute = recompute
        self.apply(init_linear)

    def forward(self, x, num_masked):
        x = run_blocks(self.blocks, x, self.recompute)
        x = x[:, -num_masked:]  # [B, M, d]
        return self.head(self.norm(x))


def projection_mlp(in_width, widths):
    """φ as a network for the pixels of one tube (Sec. 3.2): [..., in_width] -> [..., widths[-1]]. It is a
    stack of Linear layers of these widths with a GELU between them."""
    layers = []
    for width in widths:
        layers += [nn.Linear(in_width, width), nn.GELU()]
        in_width = width
    return nn.Sequential(*layers[:-1])


class DinoViT(nn.Module):
    """φ as a frozen network: DINO v1's image ViT (Caron et al., 2021), with the names of its public files.

    Images [B, 3, H, W], ImageNet-normalised -> patch tokens after the final norm [B, H/16 · W/16, E]. Pastes
    with: Attention, Block, mark_loaded, run_blocks."""
    def __init__(self, width, depth, heads):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 14 * 14, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, kernel_size=16, stride=16)})
        self.blocks = nn.ModuleList([Block(width, heads, key_bias=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.weights_loaded = False
        self.register_load_state_dict_post_hook(mark_loaded)

    def forward(self, images):
        x = self.patch_embed["proj"](images)  # [B, E, H/16, W/16]
        cls_position, positions = self.pos_embed.split([1, 14 * 14], dim=1)
        if x.shape[-2:] != (14, 14):  # the positions are for 224 pixels; stretch them to other sizes
            positions = positions.transpose(1, 2).unflatten(2, (14, 14))
            positions = F.interpolate(positions, size=x.shape[-2:], mode="bicubic")
            positions = positions.flatten(2).transpose(1, 2)
        x = x.flatten(2).transpose(1, 2) + positions  # [B, H/16 · W/16, E]
        cls = (self.cls_token + cls_position).expand(len(x), -1, -1)  # [B, 1, E]
        x = run_blocks(self.blocks, torch.cat([cls, x], dim=1))
        x = self.norm(x)
        return x[:, 1:]  # without the class token


def mark_loaded(module, keys):
    """PyTorch calls this after load_state_dict, with the keys that did not fit."""
    module.weights_loaded = not keys.missing_keys


class Block(nn.Module):
    """Pre-norm transformer block, [B, n, width] -> the same. Pastes with: Attention.
    drop_path: chance of skipping a branch, drawn for each clip, in training only (stochastic depth)."""
    def __init__(self, width, heads, key_bias=False, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, key_bias)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential()  # its layers have the names of the checkpoints
        self.mlp.add_module("fc1", nn.Linear(width, 4 * width))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * width, width))
        self.drop_path = drop_path

    def forward(self, x):
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))

    def drop(self, branch):
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)  # keeps the expected value


class Attention(nn.Module):
    """Multi-head self-attention, [B, n, width] -> the same: softmax(query keyᵀ / √(width / heads)) value.

    Queries and values have a bias, keys have none, as in BEiT and VideoMAE: a key bias would add the same
    value to all logits of a query, which softmax ignores. DINO's public files have one (key_bias=True)."""
    def __init__(self, width, heads, key_bias=False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=key_bias)
        if not key_bias:
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        bias = self.qkv.bias
        if bias is None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        x = F.linear(x, self.qkv.weight, bias)  # [B, n, 3 · width]
        x = x.unflatten(-1, (3, self.heads, -1))  # [B, n, 3, heads, width / heads]
        query, key, value = x.permute(2, 0, 3, 1, 4)  # each [B, heads, n, width / heads]
        x = F.scaled_dot_product_attention(query, key, value)
        return self.proj(x.transpose(1, 2).flatten(2))  # [B, n, width]


def run_blocks(blocks, x, recompute=False):
    """Applies the blocks in order. recompute: keep only each block's input and compute the rest again in the
    backward pass (activation checkpointing): same numbers, less memory, about a third more time."""
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        else:
            x = block(x)
    return x


def sincos_table(count, width):
    """Fixed 1-D positions [count, width]; p is the index of the tube in its clip. Row p, column j holds sin
    (j even) or cos (j odd) of p / 10000^(2⌊j/2⌋ / width)."""
    position = torch.arange(count, dtype=torch.float64)[:, None]  # [count, 1]
    j = torch.arange(width, dtype=torch.float64)  # [width]
    angle = position / 10000 ** (2 * (j // 2) / width)  # [count, width]
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()


def init_linear(layer):
    """Initialises a Linear layer as the authors' encoder and decoder do: Xavier weights, zero bias."""
    if isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


# ============ checks, and reading a checkpoint ============
def check_settings(size, target, loss, num_prototypes, eps, iterations, temperature, assignment, teacher,
                   frames, image_size):
    """ValueError for impossible settings of SIGMA. Pastes with: PROJECTION, SIZES, TEACHERS, TUBELET."""
    choices = {"size": (size, SIZES), "target": (target, ("mlp", "dino", "pixel")),
               "loss": (loss, ("sigma", "l2")), "assignment": (assignment, ("hard", "soft")),
               "teacher": (teacher, TEACHERS)}
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} {value!r} is not one of: {', '.join(allowed)}")
    patch = SIZES[size]["patch"]
    for name, value, unit in (("frames", frames, TUBELET), ("image_size", image_size, patch)):
        if value < unit or value % unit != 0:
            raise ValueError(f"{name} is {value}: it must be a positive multiple of {unit}")
    for name, value in (("num_prototypes", num_prototypes), ("eps", eps), ("temperature", temperature)):
        if not value > 0:
            raise ValueError(f"{name} is {value}: it must be positive")
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}: it must not be negative")
    if target == "pixel" and loss == "sigma":
        raise ValueError("target pixel goes with loss l2 (that is VideoMAE): pixels are not clustered")


def check_inputs(model, video, mask):
    """Raises ValueError unless the model was built for these shapes. Pastes with: TUBELET."""
    video_shape = (len(video), 3, model.frames, model.image_size, model.image_size)
    mask_shape = (len(video), model.num_tubes)
    if video.shape != video_shape:
        raise ValueError(f"video (clips, colours, frames, height, width) is {tuple(video.shape)}, "
                         f"but the model was built for {video_shape}")
    if mask.shape != mask_shape:
        question = ""
        if mask.shape[-1] == TUBELET * model.num_tubes:
            question = ": did tube_mask count frames instead of steps of two frames?"
        raise ValueError(f"mask (clips, tubes) is {tuple(mask.shape)} instead of {mask_shape}{question}")


def load_checkpoint(path):
    """Reads a checkpoint of this project or of the authors into a dict, on the CPU, executing nothing in it.
    Then model.load_state_dict(load_checkpoint(path)["model"]). OSError if it cannot be opened, ValueError if
    it is truncated, no checkpoint, or holds anything but tensors and plain data."""
    import argparse  # the authors' files hold an argparse.Namespace, which is plain data
    # Allowed permanently, because a temporary allowance is not thread-safe.
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # a file that is no checkpoint can raise anything
        reason = type(error).__name__
        if "GLOBAL " in str(error):  # PyTorch names what it refused to run
            reason = "it wants to run " + str(error).split("GLOBAL ")[1].split()[0]
        raise ValueError(f"{path}: refused, it is no checkpoint of tensors and plain data ({reason}); "
                         "nothing in it was run") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


# ============ python sigma.py: the paper's argument in less than a minute ============
def drifting_textures(textures, batch, frames=4):
    """Clips [batch, 3, frames, H, W]: each shows one texture of [n, 3, H, W], drifting at its own speed."""
    clips = []
    for texture in textures[torch.randint(len(textures), (batch,))]:
        speed = 2 * torch.rand(2) - 1  # pixels per frame, down and right
        shifts = [(t * speed).round().int().tolist() for t in range(frames)]
        clips.append(torch.stack([texture.roll(shift, dims=(1, 2)) for shift in shifts], dim=1))
    return torch.stack(clips)


def demonstration(steps=100, batch=32, seed=0):
    """Four models learn from the same toy clips; the two that reach a perfect loss are the two failures.

    L2: both networks output a constant. no Sinkhorn: nothing makes the assignments even, one prototype takes
    all. SIGMA: features stay apart. soft: SIGMA with soft targets, which are nearly flat in so few steps."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # for the same numbers on machines with more cores
    runs = {"L2": {"loss": "l2"}, "no Sinkhorn": {"iterations": 0}, "SIGMA": {},
            "soft": {"assignment": "soft"}}
    models, optimizers = {}, {}
    for name, changes in runs.items():
        models[name] = SIGMA("tiny", num_prototypes=32, frames=4, image_size=32, **changes)
        optimizers[name] = torch.optim.AdamW(models[name].parameters(), lr=1e-3)
    textures = torch.randn(8, 3, 8, 8).tile(1, 1, 4, 4)  # [8, 3, 32, 32]; period 8 is the size of a tube

    print("Collapse: spread (random weights: 0.6) is under 0.1, or perplexity, prototypes in use, is 1.\n"
          "Learning: no collapse, and agreement (tubes that both networks assign alike) far above 1/32.")
    for step in range(1, steps + 1):
        video = drifting_textures(textures, batch)
        mask = tube_mask(batch, steps=2, patches=16, ratio=0.75)
        for name, model in models.items():
            loss, stats = model(video, mask)
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            if step == 1 or step % 20 == 0:
                shown = [f"{key} {value:.2f}" for key, value in stats.items() if "loss" not in key]
                print(f"step {step:3}  {name:11}  loss {loss.item():.3f}", *shown, sep="   ")


if __name__ == "__main__":
    demonstration()
