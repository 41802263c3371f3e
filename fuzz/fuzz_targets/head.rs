//! `logits = hidden · weightᵀ + bias` in f64, with bounds on the rounding errors.

use crate::compare::to_f64s;
use crate::formula::{Approx, Shape, underflow_error, unit_roundoff};
use candle_core::{DType, Result, Tensor};
use std::ops::Range;

pub struct Head {
    hidden: Vec<f64>,
    weight: Vec<f64>,
    bias: Option<Vec<f64>>,
    shape: Shape,
    hidden_size: usize,
    /// The relative error of a product in a sum, and the error near 0.
    relative_error: f64,
    underflow_error: f64,
}

impl Head {
    /// From hidden states, a weight and maybe a bias, which are multiplied in this dtype.
    pub fn new(inputs: &[Tensor], shape: Shape, dtype: DType) -> Result<Self> {
        let numbers = inputs.iter().map(to_f64s).collect::<Result<Vec<_>>>()?;
        let mut numbers = numbers.into_iter();
        let (hidden, weight) = (numbers.next(), numbers.next());
        let hidden_size = inputs.first().and_then(|hidden| hidden.dims().last().copied());
        let hidden_size = hidden_size.unwrap_or(0);
        let max_terms = hidden_size.max(shape.rows).max(shape.classes);
        Ok(Self {
            hidden: hidden.unwrap_or_default(),
            weight: weight.unwrap_or_default(),
            bias: numbers.next(),
            shape,
            hidden_size,
            relative_error: (max_terms + 4) as f64 * unit_roundoff(dtype),
            underflow_error: underflow_error(dtype),
        })
    }

    /// sum + a·b, with a bound on the error of any order of the summation.
    fn add_product(&self, sum: Approx, a: Approx, b: f64) -> Approx {
        let term = a.mul(b);
        let rounding = self.relative_error * term.value.abs() + self.underflow_error;
        Approx { value: sum.value + term.value, error: sum.error + term.error + rounding }
    }

    /// The logits, and a bound on their error, which is infinite if it is not small.
    pub fn logits(&self) -> (Vec<f64>, f64) {
        let Shape { rows, classes, .. } = self.shape;
        let exact = |value| Approx { value, error: 0. };
        let mut logits = Vec::with_capacity(rows * classes);
        let mut logit_error = 0f64;
        for row in 0..rows {
            for class in 0..classes {
                let bias = self.bias.as_ref().map_or(0., |bias| bias[class]);
                let start = self.add_product(Approx::default(), exact(bias), 1.);
                let logit = (0..self.hidden_size).fold(start, |sum, i| {
                    let h = self.hidden[row * self.hidden_size + i];
                    self.add_product(sum, exact(h), self.weight[class * self.hidden_size + i])
                });
                logit_error =
                    if logit.error < 0.01 { logit_error.max(logit.error) } else { f64::INFINITY };
                logits.push(logit.value);
            }
        }
        (logits, logit_error)
    }

    /// The gradients of the hidden states, the weight and the bias, from those of the logits of some of the classes. The weight and the
    /// bias are those of these classes.
    pub fn gradients(&self, grad_logits: &[Approx], of: Range<usize>) -> [Vec<Approx>; 3] {
        let Shape { rows, classes, .. } = self.shape;
        let hidden_size = self.hidden_size;
        let mut hidden = vec![Approx::default(); self.hidden.len()];
        let mut weight = vec![Approx::default(); of.len() * hidden_size];
        let mut bias = vec![Approx::default(); of.len()];
        for row in 0..rows {
            for (here, class) in of.clone().enumerate() {
                let grad_logit = grad_logits[row * classes + class];
                for i in 0..hidden_size {
                    let (h, w) = (row * hidden_size + i, class * hidden_size + i);
                    hidden[h] = self.add_product(hidden[h], grad_logit, self.weight[w]);
                    let w = here * hidden_size + i;
                    weight[w] = self.add_product(weight[w], grad_logit, self.hidden[h]);
                }
                bias[here] = self.add_product(bias[here], grad_logit, 1.);
            }
        }
        [hidden, weight, bias]
    }
}
