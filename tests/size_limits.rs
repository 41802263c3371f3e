//! Sizes at their limits: products that overflow, dimensions of zero anywhere, and numbers that a half type has not.

mod common;

use candle_core::{DType, Result, Shape, Tensor, Var};
use candle_label_smoothing::{
    LabelSmoothingLoss, Reduction, Smoothing, check_targets, smooth_targets,
};
use common::{
    CPU, OnDevice, dtypes, on_device, random, random_labels, random_probabilities, values,
};

const VAST: usize = usize::MAX;

fn loss() -> candle_label_smoothing::Result<LabelSmoothingLoss> {
    Ok(LabelSmoothingLoss::new(Smoothing::over_all(0.1)?))
}

fn error<T>(result: candle_label_smoothing::Result<T>) -> String {
    result.err().expect("no error").to_string()
}

/// Every rank to four and every set of its dimensions zero: an error if there are no classes, a result of
/// nothing otherwise.
#[test]
fn zeros_anywhere() -> Result<()> {
    for dtype in dtypes() {
        for (rank, zeros) in (1..=4).flat_map(|rank| (1..1 << rank).map(move |zeros| (rank, zeros)))
        {
            let dims: Vec<usize> =
                (0..rank).map(|dim| if zeros >> dim & 1 == 1 { 0 } else { 2 + dim }).collect();
            let logits = Var::zeros(Shape::from(dims.clone()), dtype, &CPU)?;
            for class_dim in 0..rank {
                let mut rows = dims.clone();
                let num_classes = rows.remove(class_dim);
                let labels = Tensor::zeros(rows.clone(), DType::I64, &CPU)?;
                for reduction in [Reduction::None, Reduction::Sum, Reduction::Mean] {
                    let loss = loss()?.with_class_dim(class_dim).with_reduction(reduction);
                    for targets in [&labels, logits.as_tensor()] {
                        let result = loss.on_device(&logits, targets);
                        if num_classes == 0 {
                            assert!(error(result).contains("class"), "{dims:?}, {class_dim}");
                            continue;
                        }
                        let result = result?;
                        match reduction {
                            Reduction::None => assert_eq!(result.dims(), rows),
                            Reduction::Sum => assert_eq!(values(&result)?, [0.]),
                            _ => assert!(values(&result)?[0].is_nan()),
                        }
                        let gradients = result.backward()?;
                        let gradient = gradients.get(&logits).expect("no gradient");
                        assert_eq!((gradient.dims(), gradient.dtype()), (&dims[..], dtype));
                    }
                }
            }
        }
    }
    Ok(())
}

/// The same of hidden states and weights: only classes have to be there.
#[test]
fn zeros_anywhere_in_hidden_states() -> Result<()> {
    for zeros in 0..16 {
        let [batch, rows, size, num_classes] =
            std::array::from_fn(|dim| if zeros >> dim & 1 == 1 { 0 } else { 2 + dim });
        let hidden = Var::from_tensor(&on_device(&random(&[batch, rows, size], 1., 1)?)?)?;
        let weight = Var::from_tensor(&on_device(&random(&[num_classes, size], 1., 2)?)?)?;
        let targets = on_device(&random_labels(&[batch, rows], num_classes.max(1), 3)?)?;
        let loss = loss()?.with_reduction(Reduction::Sum);
        let result = loss.forward_linear(&hidden, &weight, None, &targets);
        if num_classes == 0 {
            assert!(error(result).contains("class"));
            continue;
        }
        let result = result?;
        // Without hidden units all logits are 0; candle multiplies no such matrices.
        let logits = match size {
            0 => Tensor::zeros((batch, rows, num_classes), DType::F64, hidden.device())?,
            _ => hidden.broadcast_matmul(&weight.t()?)?,
        };
        let expected = loss.forward(&logits, &targets)?;
        assert!((values(&result)?[0] - values(&expected)?[0]).abs() < 1e-12);
        assert_eq!(batch * rows == 0, values(&result)?[0] == 0.);
        let gradients = result.backward()?;
        for var in [&hidden, &weight] {
            assert_eq!(gradients.get(var).map(|gradient| gradient.dims()), Some(var.dims()));
        }
    }
    Ok(())
}

/// What no memory holds is an error, of views too whose own memory is a single number; and a dimension of
/// zero makes the others harmless.
#[test]
fn products_that_overflow() -> Result<()> {
    let zero = |dtype| Tensor::zeros((), dtype, &CPU);
    for dtype in dtypes() {
        for dims in [
            &[VAST][..],
            &[1, VAST],
            &[VAST, 1],
            &[1 << 32, 1 << 32],
            &[1 << 31, 1 << 31],
            &[VAST / 2, 2, 3],
            &[2, VAST / 2 + 1],
            &[1 << 16, 1 << 16, 1 << 16, 1 << 16],
        ] {
            let logits = zero(dtype)?.broadcast_as(dims)?;
            for class_dim in 0..dims.len() {
                let mut rows = dims.to_vec();
                rows.remove(class_dim);
                let labels = zero(DType::U8)?.broadcast_as(rows)?;
                let loss = loss()?.with_class_dim(class_dim);
                for targets in [&labels, &logits] {
                    let message = error(loss.forward(&logits, targets));
                    assert!(message.contains("too large"), "{dims:?}: {message}");
                }
            }
        }
        // Nothing to compute, and nothing to overflow.
        for dims in [&[0, 1 << 31][..], &[1 << 40, 0, 3]] {
            let logits = zero(dtype)?.broadcast_as(dims)?;
            let labels = zero(DType::U8)?.broadcast_as(&dims[..dims.len() - 1])?;
            let result = loss()?.with_reduction(Reduction::Sum).forward(&logits, &labels)?;
            assert_eq!(values(&result)?, [0.]);
        }
        let (logits, labels) = (zero(dtype)?.broadcast_as((0, VAST))?, zero(DType::U8)?);
        let message = error(loss()?.forward(&logits, &labels.broadcast_as(0)?));
        assert!(message.contains("too large"), "{message}");
    }
    let labels = Tensor::zeros(1, DType::U32, &CPU)?;
    for num_classes in [VAST, VAST / 8, 1 << 60] {
        let message = error(smooth_targets(&labels, num_classes, &Smoothing::none()));
        assert!(message.contains("too large"), "{message}");
    }
    // The range alone needs no memory.
    check_targets(&labels, VAST, None)?;
    let hidden = zero(DType::F32)?.broadcast_as((1, 1))?;
    let weight = zero(DType::F32)?.broadcast_as((VAST, 1))?;
    let message = error(loss()?.forward_linear(&hidden, &weight, None, &labels));
    assert!(message.contains("too large"), "{message}");
    Ok(())
}

/// A gradient in f16 is infinite where the exact one rounds to infinity, and only there.
#[test]
fn f16_is_infinite_only_beyond_its_range() -> Result<()> {
    let (rows, num_classes) = (3000, 7);
    let logits = random(&[rows, num_classes], 4., 1)?.to_dtype(DType::F16)?;
    // Around 65504, f16's largest number, from both sides; and an exact 0 and a label of probability nearly 1.
    let upstream = random(&[rows], 3e5, 2)?.to_dtype(DType::F32)?;
    let labels = random_labels(&[rows], num_classes, 3)?;
    let probabilities = random_probabilities(&[rows, num_classes], 1, 4)?;
    let weights = random(&[num_classes], 2., 5)?.abs()?;
    let plain = loss()?.with_reduction(Reduction::None);
    let (mut finite, mut infinite) = (0, 0);
    for loss in
        [plain.clone(), plain.clone().with_class_weights(&weights)?, plain.with_z_loss(0.1)?]
    {
        for targets in [&labels, &probabilities] {
            let gradient = |dtype: DType| -> Result<Vec<f64>> {
                let logits = Var::from_tensor(&logits.to_dtype(dtype)?)?;
                let result = loss.on_device(&logits, targets)?;
                let upstream = upstream.to_dtype(result.dtype())?;
                let gradients = (result * upstream)?.sum_all()?.backward()?;
                values(gradients.get(&logits).expect("no gradient"))
            };
            for (ours, exact) in gradient(DType::F16)?.into_iter().zip(gradient(DType::F64)?) {
                // Halfway to the number that would come next: from there on it rounds to infinity. Terms are
                // computed in f32, at most 2e6 here, so very near to it either answer is right.
                let beyond = exact.abs() - 65520.;
                if beyond.abs() > 2e6 * 2f64.powi(-22) {
                    assert_eq!(ours.is_infinite(), beyond > 0., "{ours}, exactly {exact}");
                    assert!(!ours.is_nan() && (ours.signum() == exact.signum() || exact == 0.));
                    *if ours.is_infinite() { &mut infinite } else { &mut finite } += 1;
                }
            }
        }
    }
    assert!(finite > 10_000 && infinite > 10_000, "{finite} finite, {infinite} infinite");
    Ok(())
}
