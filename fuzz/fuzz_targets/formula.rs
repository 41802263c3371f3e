//! The expected losses and gradients, computed in f64 one element at a time, with bounds on their rounding errors.

use candle_core::DType;
use candle_label_smoothing::Reduction;
use std::ops::Range;

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

/// Above this limit, a result may overflow or not, depending on the order of the operations.
fn limit(dtype: DType) -> f64 {
    if dtype == DType::F64 { 1e290 } else { 1e30 }
}

/// The library rounds in vectors within blocks of 256 classes and merges the blocks in f64. This crate's functions round once for
/// each class, in f64.
fn relative_error(classes: usize, dtype: DType) -> f64 {
    let formula_error = classes as f64 * f64::EPSILON;
    (64 + classes.min(256) / 4) as f64 * unit_roundoff(compute_dtype(dtype)) + formula_error
}

/// Half the distance from 1 to the next larger number.
pub fn unit_roundoff(dtype: DType) -> f64 {
    limits(dtype).0
}

/// A bound on the rounding error near 0.
pub fn underflow_error(dtype: DType) -> f64 {
    limits(dtype).1
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
    Unmasked,
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
    pub row_weights: Option<Vec<f64>>,
    pub scale: f64,
    pub cap: Option<f64>,
}

/// The metrics of a row: nll, confidence, entropy and lse. The prediction may be any class whose logit is near the largest one.
pub struct RowMetrics {
    pub values: [Approx; 4],
    pub predictions: Vec<usize>,
    pub counts: bool,
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

    /// The elements of some of the classes, in the order of a tensor of these classes.
    pub fn of_classes<T: Copy>(self, elements: &[T], classes: Range<usize>) -> Vec<T> {
        let outer = (0..self.rows).step_by(self.stride.max(1));
        let starts = outer.flat_map(|row| classes.clone().map(move |class| self.index(row, class)));
        starts.flat_map(|start| elements[start..start + self.stride].iter().copied()).collect()
    }
}

impl Formula {
    /// The smoothed target of a class with probability `p`. `error` is the sum of the absolute values of its terms;
    /// the caller multiplies it by the relative rounding error.
    pub fn target(&self, p: f64, class: usize, classes: usize) -> Approx {
        let (epsilon, classes) = (self.epsilon, classes as f64);
        let (prob_scale, off_value) = match &self.kind {
            SmoothingKind::None => (1., 0.),
            // Of a row without masked classes. `evaluate` knows the others.
            SmoothingKind::All | SmoothingKind::Unmasked => (1. - epsilon, epsilon / classes),
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

    pub fn row_weight(&self, row: usize) -> f64 {
        self.row_weights.as_ref().map_or(1., |weights| weights[row])
    }

    /// Whether no row weight may become 0 or infinite when it is rounded.
    pub fn row_weights_are_in_range(&self, dtype: DType) -> bool {
        let range = 1. / limit(dtype)..limit(dtype);
        self.row_weights.iter().flatten().all(|weight| *weight == 0. || range.contains(weight))
    }

    fn is_mapped(&self) -> bool {
        self.scale != 1. || self.cap.is_some()
    }

    /// The scaled and capped logit, and the factor of its gradient.
    fn map(&self, x: f64, dtype: DType) -> (f64, f64) {
        let (_, least, most) = limits(compute_dtype(dtype));
        let scale = self.scale.clamp(least, most);
        match self.cap.map(|cap| cap.clamp(least, most)) {
            Some(cap) if x > f64::NEG_INFINITY => {
                let t = scale * x / cap;
                let tanh = t.tanh();
                // Near 0, where tanh t = t, t may be subnormal.
                let capped = if t.abs() < 1e-9 { scale * x } else { cap * tanh };
                (capped, scale * (1. - tanh * tanh))
            }
            // Only a mask is −∞.
            _ if x > f64::NEG_INFINITY => ((scale * x).max(f64::MIN), scale),
            _ => (scale * x, scale),
        }
    }

    /// A bound on the error of the mapped logits of a row; infinite if it is not small.
    fn map_error(&self, x: &[f64], logit_error: f64, dtype: DType) -> f64 {
        if !self.is_mapped() {
            return logit_error;
        }
        let finite = x.iter().filter(|x| x.is_finite());
        let largest = finite.fold(0f64, |largest, x| largest.max(x.abs()));
        let limit = limit(dtype);
        let is_in_range = |number: f64| (1. / limit..limit).contains(&number);
        let numbers = [self.scale, self.cap.unwrap_or(1.), self.scale / self.cap.unwrap_or(1.)];
        let error = logit_error * self.scale + 8. * unit_roundoff(compute_dtype(dtype)) * largest;
        if error < 0.01 && numbers.into_iter().all(is_in_range) { error } else { f64::INFINITY }
    }

    fn counts(&self, targets: &Targets, row: usize) -> bool {
        let is_ignored = match targets {
            Targets::Labels(labels) => Some(labels[row]) == self.ignore_index,
            Targets::Probabilities(_) => false,
        };
        self.row_weight(row) != 0. && !is_ignored
    }

    /// The metrics of the rows. An infinite `logit_error` accepts any numbers.
    pub fn metrics(
        &self,
        logits: &[f64],
        logit_error: f64,
        shape: Shape,
        labels: &[i64],
        dtype: DType,
    ) -> Vec<RowMetrics> {
        let Shape { rows, classes, .. } = shape;
        let targets = Targets::Labels(labels.to_vec());
        let row_metrics = |row: usize| {
            if !self.counts(&targets, row) {
                let values = [Approx::default(); 4];
                return RowMetrics { values, predictions: vec![0], counts: false };
            }
            let given = (0..classes).map(|class| logits[shape.index(row, class)]);
            let x: Vec<f64> = given.map(|x| self.map(x, dtype).0).collect();
            let logit_error = self.map_error(&x, logit_error, dtype);
            if !logit_error.is_finite() {
                let values = [Approx::UNKNOWN; 4];
                return RowMetrics { values, predictions: (0..classes).collect(), counts: true };
            }
            let max = x.iter().fold(f64::NEG_INFINITY, |max, x| max.max(*x));
            if max == f64::NEG_INFINITY || x.iter().any(|x| x.is_nan()) {
                let values = [Approx::exact(f64::NAN); 4];
                return RowMetrics { values, predictions: vec![0], counts: true };
            }
            let is_near = |class: &usize| x[*class] >= max - 2. * logit_error;
            let mut predictions: Vec<usize> = (0..classes).filter(is_near).collect();
            if logit_error == 0. {
                predictions.truncate(1);
            }
            if max.abs() >= limit(dtype) {
                let values = [Approx::UNKNOWN; 4];
                return RowMetrics { values, predictions, counts: true };
            }
            let sum_exp: f64 = x.iter().map(|x| (x - max).exp()).sum();
            let log_sum = sum_exp.ln();
            let relative_error = relative_error(classes, dtype) + 4. * logit_error;
            let approx = |value, magnitude| Approx { value, error: relative_error * magnitude };
            let label = x[labels[row] as usize];
            let nll = match label > f64::NEG_INFINITY {
                true if max - label >= limit(dtype) => Approx::UNKNOWN,
                true => approx(log_sum + (max - label), max - label + log_sum + 1.),
                false => Approx::exact(f64::INFINITY),
            };
            let (mut entropy, mut magnitude) = (0., 1. + log_sum);
            for x in x.iter().filter(|x| **x > f64::NEG_INFINITY) {
                let p = (x - max).exp() / sum_exp;
                // The relative error of an exponential grows with its argument.
                if p > 0. {
                    entropy += p * (log_sum + (max - x));
                    magnitude += p * (log_sum + (max - x) + 1.) * (1. + max - x);
                }
            }
            let lse = approx(max + log_sum, max.abs() + log_sum + 1.);
            let values = [nll, approx(1. / sum_exp, 1.), approx(entropy, magnitude), lse];
            RowMetrics { values, predictions, counts: true }
        };
        (0..rows).map(row_metrics).collect()
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
        if !self.row_weights_are_in_range(dtype) {
            let num_losses = if self.reduction == Reduction::None { rows } else { 1 };
            return (vec![Approx::UNKNOWN; num_losses], vec![Approx::UNKNOWN; logits.len()]);
        }
        let is_counted = |row: usize| self.counts(targets, row);
        let is_mean = matches!(self.reduction, Reduction::Mean | Reduction::MeanOrZero);
        let divisor_terms = (0..rows).filter(|row| is_counted(*row)).map(|row| match targets {
            Targets::Labels(labels) => self.weight(labels[row] as usize) * self.row_weight(row),
            Targets::Probabilities(_) => self.row_weight(row),
        });
        let divisor = if is_mean { divisor_terms.sum() } else { 1. };
        let (unit_roundoff, underflow_error, _) = limits(compute_dtype(dtype));
        let limit = limit(dtype);
        if self.reduction == Reduction::MeanOrZero && divisor == 0. {
            return (vec![Approx::default()], vec![Approx::default(); logits.len()]);
        }
        let given_error = logit_error;
        let mut losses = vec![Approx::default(); rows];
        let mut gradient = vec![Approx::default(); logits.len()];
        for row in (0..rows).filter(|row| is_counted(*row)) {
            let given: Vec<f64> =
                (0..classes).map(|class| logits[shape.index(row, class)]).collect();
            let (x, factors): (Vec<f64>, Vec<f64>) = match self.is_mapped() {
                true => given.iter().map(|x| self.map(*x, dtype)).unzip(),
                false => (given.clone(), vec![1.; classes]),
            };
            let logit_error = self.map_error(&x, given_error, dtype);
            let relative_error = relative_error(classes, dtype) + 4. * logit_error;
            let is_masked = |class: usize| given[class] == f64::NEG_INFINITY;
            let num_unmasked = (0..classes).filter(|class| !is_masked(*class)).count();
            let class_term = |class: usize| {
                let logit = x[class];
                let p = match targets {
                    Targets::Labels(labels) => f64::from(u8::from(labels[row] == class as i64)),
                    Targets::Probabilities(p) => p[shape.index(row, class)],
                };
                let mut target = self.target(p, class, classes);
                if matches!(self.kind, SmoothingKind::Unmasked) {
                    let own = (1. - self.epsilon) * p;
                    let share = self.epsilon / num_unmasked as f64;
                    let share = if is_masked(class) { 0. } else { share };
                    target = Approx { value: own + share, error: own.abs() + share };
                }
                // Near 0, the error is absolute, since subnormal numbers have fewer digits.
                let subnormal_error = underflow_error / unit_roundoff;
                if target.error > 0. {
                    target.error += subnormal_error;
                }
                let mut target = target.mul(self.weight(class));
                let is_zero = target.error == 0.;
                let is_in_range = p.abs() < limit && self.weight(class) < limit;
                target.error += if is_in_range { subnormal_error } else { f64::INFINITY };
                ClassTerm { logit, target, is_zero, has_nan: logit.is_nan() || p.is_nan() }
            };
            let terms: Vec<ClassTerm> = (0..classes).map(class_term).collect();
            let row_weight = self.row_weight(row);
            let grad_loss = match self.reduction {
                Reduction::None => grad_output[row] * row_weight,
                _ => grad_output[0] * row_weight / divisor,
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
                // The product with the row weight may be subnormal.
                true => Approx { value: loss, error: relative_error * magnitude }
                    .mul(row_weight)
                    .add(Approx { value: 0., error: 4. * f64::from_bits(1) }),
            };
            if losses[row].value.abs() + losses[row].error >= limit && !is_infinite {
                losses[row] = Approx::UNKNOWN;
            }

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
                let mut error =
                    expected.error + underflow_error * (coeff_magnitude + target.error + 1.);
                let mut is_in_range = is_in_range
                    && expected.value.abs() + error < limit
                    && grad_loss.abs() * coeff_magnitude.max(1.) < limit
                    && divisor > 0.;
                let mut expected = expected;
                if self.is_mapped() {
                    // 1 − tanh² has an absolute error. The derivative of a mask is undefined.
                    let rounding = 16. * unit_roundoff * self.scale;
                    let rate = self.cap.map_or(0., |cap| self.scale / cap);
                    let factor_error = rounding + 2. * self.scale * rate * given_error;
                    let size = expected.value.abs() + error;
                    error = error * factors[class].abs() + size * factor_error + underflow_error;
                    expected = expected.mul(factors[class]);
                    is_in_range &= size * self.scale < limit
                        && (self.cap.is_none() || !is_masked(class) || value == 0.);
                }
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
            // `MeanOrZero` of no rows has been returned.
            let is_empty_mean = !(0..rows).any(is_counted) && is_mean;
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
