//! The probable mistake behind an error, at the end of its message.

use super::TargetsOf;
use candle_core::DType;

/// A hint for arguments in the wrong order.
pub(super) fn dtype_hint(logits: DType) -> &'static str {
    if logits.is_int() {
        "; class indices are the second argument: forward(&logits, &targets)"
    } else {
        ""
    }
}

/// A hint for the commonest causes of class targets of another shape.
pub(super) fn shape_hint(
    targets: &[usize],
    expected: &[usize],
    logits: &[usize],
    class_dim: usize,
) -> String {
    // The length of a broadcast view may overflow.
    let len = |dims: &[usize]| dims.iter().try_fold(1usize, |len, dim| len.checked_mul(*dim));
    let lens = |dims: &[usize]| dims.iter().copied().filter(|len| *len != 1).collect::<Vec<_>>();
    // If both have several dimensions, they may be transposed, which a reshape would not mend.
    let is_flat = targets.len() < 2 || expected.len() < 2 || lens(targets) == lens(expected);
    if targets == logits && logits.get(class_dim) == Some(&1) {
        TWO_LOGITS.to_string()
    } else if targets == logits {
        format!(
            "; the loss takes one class a row: for one-hot targets pass their argmax({class_dim}). Rows with several labels need a binary cross-entropy for each class: pass Tensor::stack(&[&logits.zeros_like()?, &logits], D::Minus1)? as the logits, to a loss without with_class_dim"
        )
    } else if let Some(dim) = missing_dim(targets, logits) {
        format!(
            "; if the classes of forward's logits are in dimension {dim}, use with_class_dim({dim})"
        )
    } else if is_flat && len(targets) == len(expected) {
        "; their number is right: reshape them".to_string()
    } else {
        String::new()
    }
}

/// The dimension of the logits without which their shape is that of the targets.
fn missing_dim(targets: &[usize], logits: &[usize]) -> Option<usize> {
    (0..logits.len()).find(|&dim| logits[..dim].iter().chain(&logits[dim + 1..]).eq(targets))
}

/// A hint for the commonest causes of probabilities of another shape.
pub(super) fn probabilities_hint(targets: &[usize], logits: &[usize]) -> String {
    if missing_dim(targets, logits).is_some() {
        return "; class indices need an integer dtype: to_dtype(DType::I64)".to_string();
    }
    // The dimension of the targets for each of the logits', the first that is not taken.
    let mut order = Vec::new();
    for len in logits {
        match (0..targets.len()).find(|dim| targets[*dim] == *len && !order.contains(dim)) {
            Some(dim) => order.push(dim),
            None => return String::new(),
        }
    }
    match order.len() == targets.len() {
        true => format!("; if their dimensions are in another order, permute({order:?}) mends it"),
        false => String::new(),
    }
}

const TWO_LOGITS: &str = "; two classes need two logits a row, not one";

/// A hint for the commonest causes of a target out of range: one logit for two classes, classes counted from 1, and
/// padding.
pub(super) fn range_hint(target: i64, num_classes: usize, function: TargetsOf) -> String {
    // A negative i32 stored as u32.
    let as_i32 = u32::try_from(target).map_or(target, |t| i64::from(t.cast_signed()));
    if num_classes == 1 && target == 1 && function == TargetsOf::Loss {
        TWO_LOGITS.to_string()
    } else if target > 0 && usize::try_from(target) == Ok(num_classes) {
        "; classes are counted from 0".to_string()
    } else if target < 0 || target == 255 {
        match function {
            TargetsOf::Loss => {
                format!("; to leave such rows out of the loss, use with_ignore_index({target})")
            }
            TargetsOf::CheckTargets => {
                format!("; to accept such targets, pass Some({target}) as ignore_index")
            }
            TargetsOf::SmoothTargets => String::new(),
        }
    } else if as_i32 < 0 {
        let advice = match function {
            TargetsOf::Loss => {
                format!(
                    ": keep such targets in i64 from the start and use with_ignore_index({as_i32}), \
                     or use with_ignore_index({target})"
                )
            }
            TargetsOf::CheckTargets => {
                format!(
                    ": keep such targets in i64 from the start and pass Some({as_i32}) as \
                     ignore_index, or pass Some({target})"
                )
            }
            TargetsOf::SmoothTargets => String::new(),
        };
        format!("; perhaps it was {as_i32} before it was a u32{advice}")
    } else {
        String::new()
    }
}
