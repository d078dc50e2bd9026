"""The preference losses: log-probs in, one loss a pair out, no reduction over pairs.

``h_c`` and ``h_r`` are the log-ratios of the chosen and the rejected response, ``margin = h_c - h_r``, ``n`` numbers of
tokens. A new loss is one function here and one line of ``LOSSES``. No model, no config and no rank may enter.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dpo_ds.losses.pairs import LARGEST_EXPONENT, PairLogps


def sigmoid_loss(logps: PairLogps, *, beta: float, label_smoothing: float | Tensor) -> Tensor:
    """DPO: ``-log sigmoid(beta * margin)``, Rafailov et al. 2023, eq. 7, arXiv:2305.18290.

    With label smoothing ``e`` it is the conservative form, which takes a label to be wrong with probability ``e``:
    ``-(1 - e) log sigmoid(beta * margin) - e log sigmoid(-beta * margin)``, Mitchell 2023, eq. 3,
    https://ericmitchell.ai/cdpo.pdf.

    On length-averaged log-probs it is the length-normalised DPO of Lambert et al. 2024, section 5, arXiv:2411.15124.
    """
    return _smoothed(beta * logps.margins, label_smoothing)


def _smoothed(logits: Tensor, label_smoothing: float | Tensor) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def robust_loss(logps: PairLogps, *, beta: float, label_smoothing: float | Tensor) -> Tensor:
    """Robust DPO, which is unbiased where labels are wrong with probability ``e``.

    ``(-(1 - e) log sigmoid(beta * margin) + e log sigmoid(-beta * margin)) / (1 - 2e)``, Chowdhury et al. 2024,
    arXiv:2403.00409.
    """
    logits = beta * logps.margins
    losses = -(1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)
    return losses / (1 - 2 * label_smoothing)


def hinge_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """SLiC hinge on the DPO margin: ``max(0, 1 - beta * margin)``, Liu et al. 2023 (RSO), arXiv:2309.06657."""
    return F.relu(1 - beta * logps.margins)


def ipo_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """IPO: ``(margin - 1 / (2 beta))^2``, Azar et al. 2023, eq. 17, arXiv:2310.12036; ``beta`` is the paper's tau.

    The log-probs are averaged over tokens by default, as the authors confirmed for their experiments; the paper's
    equation holds for sums as well (``reduction="sum"``).
    """
    return (logps.margins - 1 / (2 * beta)) ** 2


def exo_pair_loss(logps: PairLogps, *, beta: float, label_smoothing: float | Tensor) -> Tensor:
    """EXO: the reverse KL from the policy's preference to the label's, which is ``(1 - e, e)``.

    ``p log(p / (1 - e)) + (1 - p) log((1 - p) / e)`` with ``p = sigmoid(beta * margin)``, Ji et al. 2024, eq. 16,
    arXiv:2402.00856. The authors' code has 1 in the place of ``1 - e``.
    """
    logits = beta * logps.margins
    wrong = torch.as_tensor(label_smoothing, dtype=logits.dtype, device=logits.device)
    right_part = logits.sigmoid() * (F.logsigmoid(logits) - torch.log1p(-wrong))
    return right_part + (-logits).sigmoid() * (F.logsigmoid(-logits) - wrong.log())


def nca_pair_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """NCA on pairs, which keeps the chosen log-prob from falling.

    ``-log sigmoid(beta h_c) - (log sigmoid(-beta h_c) + log sigmoid(-beta h_r)) / 2``, Chen et al. 2024,
    arXiv:2402.05369.
    """
    chosen, rejected = beta * logps.chosen_logratios, beta * logps.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair_loss(logps: PairLogps, *, beta: float, running: float) -> Tensor:
    """BCO on pairs: ``-log sigmoid(beta h_c - d) - log sigmoid(d - beta h_r)``, Jung et al. 2024, arXiv:2404.04656.

    The shift ``d`` is the mean reward of all responses so far, those of earlier steps only: at the first step, where
    they are 0 anyway, it is 0. TRL's BCO trainer counts the present step in, too.
    """
    chosen, rejected = beta * logps.chosen_logratios, beta * logps.rejected_logratios
    return -F.logsigmoid(chosen - running) - F.logsigmoid(running - rejected)


def bco_pair_unshifted_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """BCO on pairs without its shift, ``-log sigmoid(beta h_c) - log sigmoid(-beta h_r)``: what TRL calls bco_pair."""
    return bco_pair_loss(logps, beta=beta, running=0.0)


def sppo_hard_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """SPPO with hard labels: ``(h_c - 1 / (2 beta))^2 + (h_r + 1 / (2 beta))^2``.

    Wu et al. 2024, eq. 4.7 with win rates of 1 and 0, arXiv:2405.00675; ``beta`` is the paper's 1 / eta.
    """
    return (logps.chosen_logratios - 0.5 / beta) ** 2 + (logps.rejected_logratios + 0.5 / beta) ** 2


def aot_loss(logps: PairLogps, *, beta: float, label_smoothing: float | Tensor) -> Tensor:
    """AOT on pairs: the policy's sorted differences of log-probs against the reference's sorted differences.

    ``-log sigmoid(beta (sort(log pi_c - log pi_r) - sort(log pi_ref,c - log pi_ref,r)))``, smoothed as DPO is: Melnyk
    et al. 2024, arXiv:2406.05882. The pairs are all of a step, and an entry of the result is a quantile of
    theirs.
    """
    policy = (logps.policy_chosen - logps.policy_rejected).sort(stable=True).values
    reference = (logps.reference_chosen - logps.reference_rejected).sort(stable=True).values
    return _smoothed(beta * (policy - reference), label_smoothing)


def aot_unpaired_loss(logps: PairLogps, *, beta: float, label_smoothing: float | Tensor) -> Tensor:
    """AOT without pairs: sorted log-ratios of the chosen responses against those of the rejected ones.

    ``-log sigmoid(beta (sort(h_c) - sort(h_r)))``, smoothed as DPO is: Melnyk et al. 2024,
    arXiv:2406.05882. As for ``aot_loss``, the pairs are all of a step.
    """
    chosen, rejected = (h.sort(stable=True).values for h in (logps.chosen_logratios, logps.rejected_logratios))
    return _smoothed(beta * (chosen - rejected), label_smoothing)


def apo_zero_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """APO where chosen responses are better than the model's own: ``1 - sigmoid(beta h_c) + sigmoid(beta h_r)``.

    D'Oosterlinck et al. 2024, eq. 7, arXiv:2408.06266.
    """
    return 1 - (beta * logps.chosen_logratios).sigmoid() + (beta * logps.rejected_logratios).sigmoid()


def apo_down_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """APO where chosen responses are worse than the model's own: ``sigmoid(beta h_c) + 1 - sigmoid(beta * margin)``.

    D'Oosterlinck et al. 2024, eq. 8, arXiv:2408.06266.
    """
    return (beta * logps.chosen_logratios).sigmoid() + 1 - (beta * logps.margins).sigmoid()


def discopop_loss(logps: PairLogps, *, beta: float, tau: float) -> Tensor:
    """DiscoPOP: logistic and exponential loss, mixed by the margin itself.

    ``(1 - m) (-log sigmoid(x)) + m exp(-x)`` with ``x = beta * margin`` and ``m = sigmoid(x / tau)``, Lu et al. 2024,
    eq. 5, arXiv:2406.08414.
    """
    logits = beta * logps.margins
    mixture = (logits / tau).sigmoid()
    return -(1 - mixture) * F.logsigmoid(logits) + mixture * (-logits).clamp(max=LARGEST_EXPONENT).exp()


def simpo_loss(logps: PairLogps, *, beta: float, gamma: float) -> Tensor:
    """SimPO: ``-log sigmoid(beta (log pi_c / n_c - log pi_r / n_r) - gamma)``, without a reference.

    Meng et al. 2024, arXiv:2405.14734. The authors' code asks for ``gamma / beta`` in the place of ``gamma``.
    """
    return -F.logsigmoid(beta * (logps.policy_chosen - logps.policy_rejected) - gamma)


def orpo_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """ORPO: the chosen response's loss a token less ``beta log sigmoid`` of the log odds ratio, without a reference.

    ``-l_c - beta log sigmoid(log odds(l_c) - log odds(l_r))`` with ``l = log pi / n`` and
    ``log odds(l) = l - log(1 - exp(l))``, Hong et al. 2024, eq. 7, arXiv:2403.07691; ``beta`` is the paper's lambda.
    In the authors' code the first term can hold the prompt's tokens, too.
    """
    chosen, rejected = logps.policy_chosen, logps.policy_rejected
    return -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logps: Tensor) -> Tensor:
    # A probability of exactly 1 has no finite odds.
    below = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return below - torch.log(-torch.expm1(below))


def cpo_loss(logps: PairLogps, *, beta: float, cpo_alpha: float) -> Tensor:
    """CPO: ``-log sigmoid(beta (log pi_c - log pi_r)) - cpo_alpha log pi_c / n_c``, without a reference.

    Xu et al. 2024, arXiv:2401.08417. The second term is a mean over a response's tokens; in the authors' code it is
    one over those of all chosen responses of a micro-batch, of which long ones are a larger share.
    """
    return -F.logsigmoid(beta * (logps.policy_chosen - logps.policy_rejected)) + cpo_alpha * sft_loss(logps)


def slic_loss(logps: PairLogps, *, slic_delta: float, slic_lambda: float) -> Tensor:
    """SLiC-HF: ``max(0, slic_delta - log pi_c + log pi_r) - slic_lambda log pi_c``, without a reference.

    Zhao et al. 2023, with the chosen response as the one that is regularised to, arXiv:2305.10425.
    """
    hinge = F.relu(slic_delta - logps.policy_chosen + logps.policy_rejected)
    return hinge - slic_lambda * logps.policy_chosen


def sft_loss(logps: PairLogps) -> Tensor:
    """The chosen response's negative log-prob a token, ``-log pi_c / n_c``, without a reference.

    Added to DPO it is RPO: Pang et al. 2024, arXiv:2404.19733.
    """
    return -logps.averaged().policy_chosen


def dpop_loss(logps: PairLogps, *, beta: float, dpop_lambda: float) -> Tensor:
    """DPO-Positive, which holds the chosen log-prob up: ``-log sigmoid(beta (margin - dpop_lambda max(0, -h_c)))``.

    Pal et al. 2024, arXiv:2402.13228.
    """
    return -F.logsigmoid(beta * (logps.margins - dpop_lambda * F.relu(-logps.chosen_logratios)))


def chi_po_loss(logps: PairLogps, *, beta: float, chi_clip: float) -> Tensor:
    """Chi-squared PO: DPO with ``phi(h) = exp(h) + h`` in place of ``h``.

    ``-log sigmoid(clip(beta (phi(h_c) - phi(h_r)), -chi_clip, chi_clip))``, Huang et al. 2024,
    arXiv:2407.13399; ``chi_clip`` is the paper's 2 R_max.
    """
    chosen, rejected = (
        h.clamp(max=LARGEST_EXPONENT).exp() + h for h in (logps.chosen_logratios, logps.rejected_logratios)
    )
    return -F.logsigmoid((beta * (chosen - rejected)).clamp(-chi_clip, chi_clip))


def r_dpo_loss(logps: PairLogps, *, beta: float, length_penalty: float) -> Tensor:
    """R-DPO, whose reward is less by ``length_penalty`` a token.

    ``-log sigmoid(beta * margin + length_penalty (n_c - n_r))``, Park et al. 2024, arXiv:2403.19159;
    ``length_penalty`` is the paper's alpha.
    """
    longer = (logps.chosen_tokens - logps.rejected_tokens).to(logps.margins.dtype)
    return -F.logsigmoid(beta * logps.margins + length_penalty * longer)


def beta_dpo_loss(logps: PairLogps, *, beta: float, beta_sensitivity: float, running: float) -> Tensor:
    """Beta-DPO: DPO whose beta follows the step's mean reward margin, ``-log sigmoid(b * margin)``.

    ``b = (1 + beta_sensitivity (mean(beta * margin) - M_0)) beta``, a constant for the gradient and at least
    ``beta / 100``, with ``M_0`` the margins' running mean, which forgets a tenth a step: Wu et al. 2024,
    arXiv:2407.08639, ``beta_sensitivity`` being the paper's alpha. The authors' code leaves ``beta`` out of the means,
    so that its ``a`` is ``beta_sensitivity * beta`` here, counts the present step into ``M_0``, and has 0.001 as its
    bound. The paper's choice of pairs, which drops some at random, is left out.
    """
    excess = beta * logps.margins.detach().mean() - running
    dynamic = beta * (1 + beta_sensitivity * excess).clamp(min=0.01)
    return -F.logsigmoid(dynamic * logps.margins)


def cal_dpo_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """Cal-DPO: ``-log sigmoid(margin) + (h_c - 1 / (2 beta))^2 + (h_r + 1 / (2 beta))^2``.

    Xiao et al. 2024, arXiv:2412.14516. The preference's term has no beta. The authors' code counts the squares by half.
    """
    return -F.logsigmoid(logps.margins) + sppo_hard_loss(logps, beta=beta)
