//! Sums over many classes in f32.
//!
//! The rows of the gradient sum to Σ softmax·S − Σ r = 0, so their sum shows the error of S.

#[path = "../common/mod.rs"]
mod common;

use candle_core::{DType, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing};
use common::{CPU, random, random_labels, random_probabilities, values};

const ROWS: usize = 2;
/// Half a unit of the last place of numbers from 1 to 2.
const UNIT: f64 = 1. / (1 << 24) as f64;

/// The losses and targets. S is at most 1.5.
fn cases(num_classes: usize) -> Result<Vec<(&'static str, LabelSmoothingLoss, Tensor)>> {
    let labels = random_labels(&[ROWS], num_classes, 2)?;
    let probabilities = random_probabilities(&[ROWS, num_classes], 1, 3)?;
    let prior = random_probabilities(&[num_classes], 0, 4)?;
    let weights = (random(&[num_classes], 0.5, 5)? + 1.)?;
    let thirds = Tensor::full(1f32 / 3., num_classes, &CPU)?;
    let of = |smoothing| LabelSmoothingLoss::new(smoothing).with_reduction(Reduction::None);
    let over_all = of(Smoothing::over_all(0.9)?);
    let over_unmasked = of(Smoothing::over_unmasked(0.9)?);
    Ok(vec![
        ("over all", over_all.clone(), labels.clone()),
        ("class weights", over_all.clone().with_class_weights(&weights)?, labels.clone()),
        ("thirds", over_all.clone().with_class_weights(&thirds)?, labels.clone()),
        ("prior", of(Smoothing::toward(0.9, &prior)?), labels.clone()),
        ("unmasked", over_unmasked.with_class_weights(&weights)?, labels),
        ("probabilities", over_all, probabilities),
    ])
}

#[test]
fn sums_over_many_classes() -> Result<()> {
    for num_classes in [1000, 50_000, 500_000] {
        let logits = random(&[ROWS, num_classes], 2., 1)?.to_dtype(DType::F32)?;
        for (name, loss, targets) in cases(num_classes)? {
            let exact = loss.forward(&logits.to_dtype(DType::F64)?, &targets)?;
            for class_dim in [1, 0] {
                let turned = |tensor: &Tensor| match class_dim == 0 && tensor.rank() == 2 {
                    true => tensor.t()?.contiguous(),
                    false => Ok(tensor.clone()),
                };
                let loss = loss.clone().with_class_dim(class_dim);
                let logits = Var::from_tensor(&turned(&logits)?)?;
                let actual = loss.forward(&logits, &turned(&targets)?)?;
                let gradients = actual.backward()?;
                let gradient = gradients.get(&logits).expect("no gradient").to_dtype(DType::F64)?;
                let gradient = if class_dim == 0 { gradient.t()? } else { gradient };
                let sums = values(&gradient.sum(1)?)?;
                let sums: Vec<f64> = sums.iter().map(|sum| sum / UNIT).collect();
                let losses: Vec<f64> = values(&actual)?
                    .iter()
                    .zip(values(&exact)?)
                    .map(|(actual, exact)| (actual / exact - 1.) / UNIT)
                    .collect();
                let name = format!("{name}, {num_classes} classes, dim {class_dim}");
                assert!(sums.iter().all(|sum| sum.abs() <= 4.), "{name}: sums are off by {sums:?}");
                assert!(
                    losses.iter().all(|l| l.abs() <= 4.),
                    "{name}: losses are off by {losses:?}"
                );
            }
        }
    }
    Ok(())
}
