//! The loss by its formula, number by number in f64, and how far rounding may lead away from it.

use candle_core::DType;
use candle_label_smoothing::Reduction;

/// A number, and how far another way to it may end. Infinitely far, or NaN: nothing is known.
#[derive(Clone, Copy, Debug, Default)]
pub struct Near {
    pub value: f64,
    pub error: f64,
}

impl Near {
    pub fn add(self, other: Self) -> Self {
        Self { value: self.value + other.value, error: self.error + other.error }
    }

    /// Times an exact number.
    pub fn times(self, factor: f64) -> Self {
        Self { value: self.value * factor, error: self.error * factor.abs() }
    }

    /// After a sum of so many such terms in an arithmetic of this unit.
    pub fn summed(self, terms: usize, unit: f64, magnitude: f64) -> Self {
        Self { error: self.error + (terms + 4) as f64 * unit * magnitude, ..self }
    }

    pub fn rounded_to(self, dtype: DType) -> Self {
        if self.is_exact() {
            return self;
        }
        let (_, smallest, largest) = limits(dtype);
        let error = self.error + unit(dtype) * (self.value.abs() + self.error) + smallest;
        let overflows = self.value.abs() + error > largest;
        Self { error: if overflows { f64::INFINITY } else { error }, ..self }
    }

    pub fn holds(self, ours: f64) -> bool {
        match self.is_exact() {
            true => ours == self.value || ours.is_nan() && self.value.is_nan(),
            false => !self.error.is_finite() || (ours - self.value).abs() <= self.error,
        }
    }

    /// 0 of an ignored row, NaN of a mean of none.
    fn is_exact(self) -> bool {
        self.error == 0. && (self.value == 0. || self.value.is_nan())
    }
}

/// Half a unit in the last place of 1, the smallest normal number and the largest.
fn limits(dtype: DType) -> (f64, f64, f64) {
    match dtype {
        DType::F64 => (f64::EPSILON / 2., f64::MIN_POSITIVE, f64::MAX),
        DType::F16 => (2f64.powi(-11), 2f64.powi(-24), 65_504.),
        DType::BF16 => (2f64.powi(-8), f32::MIN_POSITIVE.into(), f32::MAX.into()),
        _ => ((f32::EPSILON / 2.).into(), f32::MIN_POSITIVE.into(), f32::MAX.into()),
    }
}

pub fn unit(dtype: DType) -> f64 {
    limits(dtype).0
}

/// The dtype of the arithmetic.
pub fn arithmetic(logits: DType) -> DType {
    if logits == DType::F64 { DType::F64 } else { DType::F32 }
}

#[derive(Debug)]
pub enum Kind {
    None,
    All,
    Others,
    Toward(Vec<f64>),
}

/// A valid loss, its options in f64.
#[derive(Debug)]
pub struct Formula {
    pub kind: Kind,
    pub epsilon: f64,
    pub class_weights: Option<Vec<f64>>,
    pub ignore_index: Option<i64>,
    pub z_loss: f64,
    pub reduction: Reduction,
}

/// What the rows aim at: a class each, or a probability for each logit.
#[derive(Debug)]
pub enum Aims {
    Labels(Vec<i64>),
    Probabilities(Vec<f64>),
}

/// Where logits lie.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub rows: usize,
    pub classes: usize,
    /// From one class to the next.
    pub stride: usize,
}

impl Shape {
    pub fn new(dims: &[usize], class_dim: usize) -> Self {
        let stride: usize = dims[class_dim + 1..].iter().product();
        let classes = dims[class_dim];
        Self { rows: dims[..class_dim].iter().product::<usize>() * stride, classes, stride }
    }

    fn at(self, row: usize, class: usize) -> usize {
        (row / self.stride * self.classes + class) * self.stride + row % self.stride
    }
}

impl Formula {
    /// The smoothed target of a class. Its error is the magnitude of the terms: of their rounding, a factor remains.
    pub fn target(&self, p: f64, class: usize, classes: usize) -> Near {
        let (epsilon, classes) = (self.epsilon, classes as f64);
        let (keep, spread) = match &self.kind {
            Kind::None => (1., 0.),
            Kind::All => (1. - epsilon, epsilon / classes),
            Kind::Others => {
                let spread = epsilon / (classes - 1.);
                let value = (1. - epsilon) * p + spread * (1. - p);
                return Near { value, error: p.abs() * (1. + spread) + spread };
            }
            Kind::Toward(prior) => (1. - epsilon, epsilon * prior[class]),
        };
        Near { value: keep * p + spread, error: keep * p.abs() + spread }
    }

    fn weight(&self, class: usize) -> f64 {
        self.class_weights.as_ref().map_or(1., |weights| weights[class])
    }

    /// The loss, and the gradient of the logits in their order. These may be off by `slack`; `upstream` is the gradient
    /// of each row's loss, or of what they are reduced to.
    pub fn evaluate(
        &self,
        logits: &[f64],
        slack: f64,
        shape: Shape,
        aims: &Aims,
        upstream: &[f64],
        dtype: DType,
    ) -> (Vec<Near>, Vec<Near>) {
        let Shape { rows, classes, .. } = shape;
        let counts = |row: usize| match aims {
            Aims::Labels(labels) => Some(labels[row]) != self.ignore_index,
            Aims::Probabilities(_) => true,
        };
        let divisor = match (self.reduction, aims) {
            (Reduction::Mean, Aims::Labels(labels)) => (0..rows)
                .filter(|row| counts(*row))
                .map(|row| self.weight(labels[row] as usize))
                .sum(),
            (Reduction::Mean, Aims::Probabilities(_)) => rows as f64,
            _ => 1.,
        };
        let unit = unit(arithmetic(dtype));
        let smallest = limits(arithmetic(dtype)).1;
        // How many roundings there are, in blocks and vectors there, one by one here.
        let here = classes as f64 * f64::EPSILON;
        let relative = (64 + classes / 4) as f64 * unit + here + 4. * slack;
        let mut losses = vec![Near::default(); rows];
        let mut gradient = vec![Near::default(); logits.len()];
        for row in (0..rows).filter(|row| counts(*row)) {
            let of_class = |class: usize| {
                let x = logits[shape.at(row, class)];
                let p = match aims {
                    Aims::Labels(labels) => f64::from(u8::from(labels[row] == class as i64)),
                    Aims::Probabilities(p) => p[shape.at(row, class)],
                };
                let mut r = self.target(p, class, classes).times(self.weight(class));
                // Of a number that is hardly more than 0, fewer digits are there; beyond f32 there are none.
                let is_tame = p.abs().max(self.weight(class)) < 1e30;
                r.error += if is_tame { smallest / unit } else { f64::INFINITY };
                (x, r)
            };
            let row_of: Vec<(f64, Near)> = (0..classes).map(of_class).collect();
            let larger = |max: f64, x: f64| max.max(if x.is_nan() { f64::INFINITY } else { x });
            let max = row_of.iter().fold(f64::NEG_INFINITY, |max, (x, _)| larger(max, *x));
            let sum: f64 = row_of.iter().map(|(x, _)| (x - max).exp()).sum();
            let log_sum = sum.ln();
            let lse = max + log_sum;
            let mut loss = self.z_loss * lse * lse;
            let mut magnitude = self.z_loss * (lse * lse + 2. * lse.abs() + 1.);
            let mut total = Near { value: 0., error: 0. };
            for (x, r) in &row_of {
                loss += r.value * (log_sum - (x - max));
                magnitude += r.error * (max - x + log_sum + 1.);
                total = total.add(*r);
            }
            let is_tame = magnitude < 1e30 && total.error < 1e30 && max.abs() < 1e30;
            let error = if is_tame { relative * magnitude } else { f64::INFINITY };
            losses[row] = Near { value: loss, error };

            let upstream = match self.reduction {
                Reduction::None => upstream[row],
                _ => upstream[0] / divisor,
            };
            let pull = total.value + 2. * self.z_loss * lse;
            let pull_magnitude = total.error + 2. * self.z_loss * (lse.abs() + 1.);
            for (class, (x, r)) in row_of.iter().enumerate() {
                let softmax = (x - max).exp() / sum;
                let magnitude = softmax * pull_magnitude * (1. + max - x) + r.error;
                let error = relative * magnitude + smallest * (pull_magnitude + 4.);
                let error = if is_tame { error } else { f64::INFINITY };
                let near = Near { value: softmax * pull - r.value, error }.times(upstream);
                let error = near.error + smallest * (pull_magnitude + r.error + 1.);
                let is_tame = near.value.abs() + error < 1e30 && divisor >= 1e-25;
                gradient[shape.at(row, class)] =
                    Near { error: if is_tame { error } else { f64::INFINITY }, ..near };
            }
        }
        if self.reduction != Reduction::None {
            let sum = losses.iter().fold(Near::default(), |sum, loss| sum.add(*loss));
            let magnitude = losses.iter().map(|loss| loss.value.abs()).sum();
            let mut reduced = sum.summed(rows, f64::EPSILON, magnitude).times(1. / divisor);
            // The class weights in the divisor were rounded too, and may be 0 by it.
            reduced.error += 4. * unit * reduced.value.abs();
            if !(0..rows).any(counts) && self.reduction == Reduction::Mean {
                reduced = Near { value: f64::NAN, error: 0. };
            } else if divisor < 1e-25 {
                reduced.error = f64::INFINITY;
            }
            losses = vec![reduced];
        }
        (losses, gradient)
    }
}
