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

    /// Nothing is known.
    const UNKNOWN: Self = Self { value: 0., error: f64::INFINITY };

    const fn exactly(value: f64) -> Self {
        Self { value, error: 0. }
    }

    /// 0 of an ignored row, NaN of a mean of none, and what is infinite or NaN by the formula.
    fn is_exact(self) -> bool {
        self.error == 0. && (self.value == 0. || !self.value.is_finite())
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

/// What is known of a class of a row.
struct Class {
    x: f64,
    r: Near,
    /// Whether no term of r is other than 0.
    is_nothing: bool,
    is_nan: bool,
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
        // Products of numbers below this one stay finite on every way.
        let beyond = if dtype == DType::F64 { 1e290 } else { 1e30 };
        // How many roundings there are: there in vectors within blocks, which are merged in f64; here one by one.
        let here = classes as f64 * f64::EPSILON;
        let relative = (64 + classes.min(256) / 4) as f64 * unit + here + 4. * slack;
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
                let is_nothing = r.error == 0.;
                // Of a number that is hardly more than 0, fewer digits are there; beyond the arithmetic there are none.
                let is_tame = p.abs() < beyond && self.weight(class) < beyond;
                r.error += if is_tame { smallest / unit } else { f64::INFINITY };
                Class { x, r, is_nothing, is_nan: x.is_nan() || p.is_nan() }
            };
            let row_of: Vec<Class> = (0..classes).map(of_class).collect();
            let upstream = match self.reduction {
                Reduction::None => upstream[row],
                _ => upstream[0] / divisor,
            };
            let max = row_of.iter().fold(f64::NEG_INFINITY, |max, class| max.max(class.x));
            // Where the logits are products, other ways to them may stay finite.
            if slack.is_finite() && (max.is_infinite() || row_of.iter().any(|class| class.is_nan)) {
                losses[row] = Near::exactly(f64::NAN);
                (0..classes).for_each(|class| gradient[shape.at(row, class)] = losses[row]);
                continue;
            }
            let sum: f64 = row_of.iter().map(|class| (class.x - max).exp()).sum();
            let log_sum = sum.ln();
            let lse = max + log_sum;
            let mut loss = self.z_loss * lse * lse;
            let mut magnitude = self.z_loss * (lse * lse + 2. * lse.abs() + 1.);
            let mut total = Near::default();
            let mut is_infinite = false;
            for Class { x, r, is_nothing, .. } in &row_of {
                total = total.add(*r);
                if *x > f64::NEG_INFINITY {
                    loss += r.value * (log_sum - (x - max));
                    magnitude += r.error * (max - x + log_sum + 1.);
                } else if r.value > 4. * relative * r.error {
                    is_infinite = true;
                } else if !is_nothing {
                    // Whether anything is left of the target is for rounding to say.
                    magnitude = f64::INFINITY;
                }
            }
            let is_tame = magnitude < beyond && total.error < beyond && max.abs() < beyond;
            losses[row] = match is_tame && relative.is_finite() {
                false => Near::UNKNOWN,
                true if is_infinite => Near::exactly(f64::INFINITY),
                true => Near { value: loss, error: relative * magnitude },
            };

            let pull = total.value + 2. * self.z_loss * lse;
            let pull_magnitude = total.error + 2. * self.z_loss * (lse.abs() + 1.);
            for (class, Class { x, r, .. }) in row_of.iter().enumerate() {
                let softmax = (x - max).exp() / sum;
                let distance = if softmax > 0. { 1. + (max - x) } else { 1. };
                let magnitude = softmax * pull_magnitude * distance + r.error;
                let error = relative * magnitude + smallest * (pull_magnitude + 4.);
                let near = Near { value: softmax * pull - r.value, error }.times(upstream);
                let error = near.error + smallest * (pull_magnitude + r.error + 1.);
                let is_tame = is_tame && near.value.abs() + error < beyond && divisor > 0.;
                gradient[shape.at(row, class)] =
                    if is_tame { Near { error, ..near } } else { Near::UNKNOWN };
            }
        }
        if self.reduction != Reduction::None {
            let sum = losses.iter().fold(Near::default(), |sum, loss| sum.add(*loss));
            let magnitude = losses.iter().map(|loss| loss.value.abs()).sum();
            let mut reduced = sum.summed(rows, f64::EPSILON, magnitude).times(1. / divisor);
            // The class weights in the divisor were rounded too, and may be 0 by it.
            reduced.error += 4. * unit * reduced.value.abs();
            let exact =
                |is: fn(f64) -> bool| losses.iter().any(|loss| loss.is_exact() && is(loss.value));
            let is_nothing = !(0..rows).any(counts) && self.reduction == Reduction::Mean;
            if is_nothing || exact(f64::is_nan) {
                reduced = Near::exactly(f64::NAN);
            } else if divisor == 0. {
                reduced = Near::UNKNOWN;
            } else if exact(f64::is_infinite) && losses.iter().all(|loss| loss.error.is_finite()) {
                reduced = Near::exactly(f64::INFINITY);
            }
            losses = vec![reduced];
        }
        (losses, gradient)
    }
}
