//! The expected losses and gradients, computed in f64 one element at a time, with bounds on their rounding errors.

use candle_core::DType;
use candle_label_smoothing::Reduction;

/// An expected value and how far a correct result may differ from it. With an infinite or NaN `error`, any result is
/// accepted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Approx {
    pub value: f64,
    pub error: f64,
}

impl Approx {
    pub fn add(self, other: Self) -> Self {
        Self { value: self.value + other.value, error: self.error + other.error }
    }

    /// The product with an exact factor.
    pub fn mul(self, factor: f64) -> Self {
        Self { value: self.value * factor, error: self.error * factor.abs() }
    }

    /// Adds the rounding error of a sum of `terms` terms whose absolute values add up to `magnitude`.
    pub fn with_sum_error(self, terms: usize, unit_roundoff: f64, magnitude: f64) -> Self {
        Self { error: self.error + (terms + 4) as f64 * unit_roundoff * magnitude, ..self }
    }

    /// Adds the error of rounding to `dtype`.
    pub fn rounded_to(self, dtype: DType) -> Self {
        if self.is_exact() {
            return self;
        }
        let (_, underflow_error, max) = limits(dtype);
        let error =
            self.error + unit_roundoff(dtype) * (self.value.abs() + self.error) + underflow_error;
        let overflows = self.value.abs() + error > max;
        Self { error: if overflows { f64::INFINITY } else { error }, ..self }
    }

    pub fn accepts(self, actual: f64) -> bool {
        match self.is_exact() {
            true => actual == self.value || actual.is_nan() && self.value.is_nan(),
            false => !self.error.is_finite() || (actual - self.value).abs() <= self.error,
        }
    }

    /// Accepts any result.
    const UNKNOWN: Self = Self { value: 0., error: f64::INFINITY };

    const fn exact(value: f64) -> Self {
        Self { value, error: 0. }
    }

    /// Whether only `value` is accepted: 0 in an ignored row, the NaN mean of no rows, and values that the formula
    /// makes infinite or NaN.
    fn is_exact(self) -> bool {
        self.error == 0. && (self.value == 0. || !self.value.is_finite())
    }
}

/// The unit roundoff of a dtype, a bound on its rounding error near 0, and its largest number.
fn limits(dtype: DType) -> (f64, f64, f64) {
    match dtype {
        DType::F64 => (f64::EPSILON / 2., f64::MIN_POSITIVE, f64::MAX),
        // The subnormal numbers of f16 are 2^−24 apart. Those of the other dtypes may become 0.
        DType::F16 => (2f64.powi(-11), 2f64.powi(-24), 65_504.),
        DType::BF16 => (2f64.powi(-8), f32::MIN_POSITIVE.into(), f32::MAX.into()),
        _ => ((f32::EPSILON / 2.).into(), f32::MIN_POSITIVE.into(), f32::MAX.into()),
    }
}

/// Half the distance from 1 to the next larger number.
pub fn unit_roundoff(dtype: DType) -> f64 {
    limits(dtype).0
}

/// The dtype in which the library computes with these logits.
pub fn compute_dtype(logits: DType) -> DType {
    if logits == DType::F64 { DType::F64 } else { DType::F32 }
}

#[derive(Debug)]
pub enum SmoothingKind {
    None,
    All,
    Others,
    Toward(Vec<f64>),
}

/// The options of a valid loss, in f64.
#[derive(Debug)]
pub struct Formula {
    pub kind: SmoothingKind,
    pub epsilon: f64,
    pub class_weights: Option<Vec<f64>>,
    pub ignore_index: Option<i64>,
    pub z_loss: f64,
    pub reduction: Reduction,
}

/// A label for each row, or a probability for each logit.
#[derive(Debug)]
pub enum Targets {
    Labels(Vec<i64>),
    Probabilities(Vec<f64>),
}

/// A class of one row.
struct ClassTerm {
    logit: f64,
    /// The smoothed target times the class weight, called r in the formula.
    target: Approx,
    /// Whether every term of `target` is 0.
    is_zero: bool,
    has_nan: bool,
}

/// The logits as rows of classes.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub rows: usize,
    pub classes: usize,
    /// The distance between neighbouring classes of a row, in elements.
    pub stride: usize,
}

impl Shape {
    pub fn new(dims: &[usize], class_dim: usize) -> Self {
        let stride: usize = dims[class_dim + 1..].iter().product();
        let classes = dims[class_dim];
        Self { rows: dims[..class_dim].iter().product::<usize>() * stride, classes, stride }
    }

    fn index(self, row: usize, class: usize) -> usize {
        (row / self.stride * self.classes + class) * self.stride + row % self.stride
    }
}

impl Formula {
    /// The smoothed target of a class with probability `p`. `error` is the sum of the absolute values of its terms;
    /// the caller multiplies it by the relative rounding error.
    pub fn target(&self, p: f64, class: usize, classes: usize) -> Approx {
        let (epsilon, classes) = (self.epsilon, classes as f64);
        let (prob_scale, off_value) = match &self.kind {
            SmoothingKind::None => (1., 0.),
            SmoothingKind::All => (1. - epsilon, epsilon / classes),
            SmoothingKind::Others => {
                let (on_value, off_value) = (1. - epsilon, epsilon / (classes - 1.));
                let value = on_value * p + off_value * (1. - p);
                return Approx { value, error: p.abs() * (1. + off_value) + off_value };
            }
            SmoothingKind::Toward(prior) => (1. - epsilon, epsilon * prior[class]),
        };
        let error = prob_scale * p.abs() + off_value;
        Approx { value: prob_scale * p + off_value, error }
    }

    fn weight(&self, class: usize) -> f64 {
        self.class_weights.as_ref().map_or(1., |weights| weights[class])
    }

    /// The losses, and the gradient of the logits in the order of `logits`.
    ///
    /// The library's logits may differ from `logits` by `logit_error`. `grad_output` is the gradient of the result:
    /// one element for each row, or a single one after a reduction.
    pub fn evaluate(
        &self,
        logits: &[f64],
        logit_error: f64,
        shape: Shape,
        targets: &Targets,
        grad_output: &[f64],
        dtype: DType,
    ) -> (Vec<Approx>, Vec<Approx>) {
        let Shape { rows, classes, .. } = shape;
        let is_counted = |row: usize| match targets {
            Targets::Labels(labels) => Some(labels[row]) != self.ignore_index,
            Targets::Probabilities(_) => true,
        };
        let divisor = match (self.reduction, targets) {
            (Reduction::Mean, Targets::Labels(labels)) => (0..rows)
                .filter(|row| is_counted(*row))
                .map(|row| self.weight(labels[row] as usize))
                .sum(),
            (Reduction::Mean, Targets::Probabilities(_)) => rows as f64,
            _ => 1.,
        };
        let (unit_roundoff, underflow_error, _) = limits(compute_dtype(dtype));
        // Above this limit, a result may overflow or not, depending on the order of the operations.
        let limit = if dtype == DType::F64 { 1e290 } else { 1e30 };
        // The library rounds in vectors within blocks of 256 classes and merges the blocks in f64. This function
        // rounds once for each class, in f64.
        let formula_error = classes as f64 * f64::EPSILON;
        let relative_error =
            (64 + classes.min(256) / 4) as f64 * unit_roundoff + formula_error + 4. * logit_error;
        let mut losses = vec![Approx::default(); rows];
        let mut gradient = vec![Approx::default(); logits.len()];
        for row in (0..rows).filter(|row| is_counted(*row)) {
            let class_term = |class: usize| {
                let logit = logits[shape.index(row, class)];
                let p = match targets {
                    Targets::Labels(labels) => f64::from(u8::from(labels[row] == class as i64)),
                    Targets::Probabilities(p) => p[shape.index(row, class)],
                };
                let mut target = self.target(p, class, classes).mul(self.weight(class));
                let is_zero = target.error == 0.;
                // Near 0, the error is absolute, since subnormal numbers have fewer digits.
                let is_in_range = p.abs() < limit && self.weight(class) < limit;
                target.error +=
                    if is_in_range { underflow_error / unit_roundoff } else { f64::INFINITY };
                ClassTerm { logit, target, is_zero, has_nan: logit.is_nan() || p.is_nan() }
            };
            let terms: Vec<ClassTerm> = (0..classes).map(class_term).collect();
            let grad_loss = match self.reduction {
                Reduction::None => grad_output[row],
                _ => grad_output[0] / divisor,
            };
            let max = terms.iter().fold(f64::NEG_INFINITY, |max, term| max.max(term.logit));
            // With an infinite `logit_error`, the library's logits may be finite where these are not.
            if logit_error.is_finite()
                && (max.is_infinite() || terms.iter().any(|term| term.has_nan))
            {
                losses[row] = Approx::exact(f64::NAN);
                (0..classes).for_each(|class| gradient[shape.index(row, class)] = losses[row]);
                continue;
            }
            let sum_exp: f64 = terms.iter().map(|term| (term.logit - max).exp()).sum();
            let log_sum = sum_exp.ln();
            let lse = max + log_sum;
            let mut loss = self.z_loss * lse * lse;
            let mut magnitude = self.z_loss * (lse * lse + 2. * lse.abs() + 1.);
            let mut target_sum = Approx::default();
            let mut is_infinite = false;
            for ClassTerm { logit, target, is_zero, .. } in &terms {
                target_sum = target_sum.add(*target);
                if *logit > f64::NEG_INFINITY {
                    loss += target.value * (log_sum - (logit - max));
                    magnitude += target.error * (max - logit + log_sum + 1.);
                } else if target.value > 4. * relative_error * target.error {
                    is_infinite = true;
                } else if !is_zero {
                    // The loss is finite or infinite, depending on whether the target rounds to 0.
                    magnitude = f64::INFINITY;
                }
            }
            let is_in_range = magnitude < limit && target_sum.error < limit && max.abs() < limit;
            losses[row] = match is_in_range && relative_error.is_finite() {
                false => Approx::UNKNOWN,
                true if is_infinite => Approx::exact(f64::INFINITY),
                true => Approx { value: loss, error: relative_error * magnitude },
            };

            // The gradient is (softmax_coeff · softmax − target) · grad_loss.
            let softmax_coeff = target_sum.value + 2. * self.z_loss * lse;
            let coeff_magnitude = target_sum.error + 2. * self.z_loss * (lse.abs() + 1.);
            for (class, ClassTerm { logit, target, .. }) in terms.iter().enumerate() {
                let softmax = (logit - max).exp() / sum_exp;
                // The relative error of an exponential grows with its argument.
                let exp_condition = if softmax > 0. { 1. + (max - logit) } else { 1. };
                let magnitude = softmax * coeff_magnitude * exp_condition + target.error;
                let error = relative_error * magnitude + underflow_error * (coeff_magnitude + 4.);
                let value = softmax * softmax_coeff - target.value;
                let expected = Approx { value, error }.mul(grad_loss);
                let error =
                    expected.error + underflow_error * (coeff_magnitude + target.error + 1.);
                let is_in_range =
                    is_in_range && expected.value.abs() + error < limit && divisor > 0.;
                gradient[shape.index(row, class)] =
                    if is_in_range { Approx { error, ..expected } } else { Approx::UNKNOWN };
            }
        }
        if self.reduction != Reduction::None {
            let sum = losses.iter().fold(Approx::default(), |sum, loss| sum.add(*loss));
            let magnitude = losses.iter().map(|loss| loss.value.abs()).sum();
            let mut reduced = sum.with_sum_error(rows, f64::EPSILON, magnitude).mul(1. / divisor);
            // The library also rounds the class weights that the divisor adds up.
            reduced.error += 4. * unit_roundoff * reduced.value.abs();
            let any_exact =
                |is: fn(f64) -> bool| losses.iter().any(|loss| loss.is_exact() && is(loss.value));
            let is_empty_mean = !(0..rows).any(is_counted) && self.reduction == Reduction::Mean;
            if is_empty_mean || any_exact(f64::is_nan) {
                reduced = Approx::exact(f64::NAN);
            } else if divisor == 0. {
                reduced = Approx::UNKNOWN;
            } else if any_exact(f64::is_infinite)
                && losses.iter().all(|loss| loss.error.is_finite())
            {
                reduced = Approx::exact(f64::INFINITY);
            }
            losses = vec![reduced];
        }
        (losses, gradient)
    }
}
