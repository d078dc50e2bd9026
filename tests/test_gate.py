import math

import pytest
import torch

from dpo_ds.errors import RunError
from dpo_ds.gate import check_first_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_loss_must_be_the_analytic_one(dtype):
    check_first_loss(math.log(2), expected=math.log(2), dtype=dtype)
    with pytest.raises(RunError, match=r"must be 0\.693147, got 0\.710000"):
        check_first_loss(0.71, expected=math.log(2), dtype=dtype)


def test_a_first_loss_that_is_no_number_is_found():
    with pytest.raises(RunError, match="got nan"):
        check_first_loss(math.nan, expected=1.0, dtype=torch.float32)
