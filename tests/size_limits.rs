//! Limits of sizes: products that overflow, dimensions of zero, and gradients beyond the range of
//! f16.
#![cfg(not(target_arch = "wasm32"))]

mod common;

use candle_core::{DType, Result, Shape, Tensor, Var};
use candle_label_smoothing::{
    LabelSmoothingLoss, Reduction, Smoothing, check_targets, smooth_targets,
};
use common::{
    CPU, OnDevice, dtypes, on_device, random, random_labels, random_probabilities, values,
};

const MAX_SIZE: usize = usize::MAX;

fn loss() -> candle_label_smoothing::Result<LabelSmoothingLoss> {
    Ok(LabelSmoothingLoss::new(Smoothing::over_all(0.1)?))
}

fn error<T>(result: candle_label_smoothing::Result<T>) -> String {
    result.err().expect("no error").to_string()
}

/// Ranks one to four with every subset of dimensions zero. No classes is an error. No rows is an
/// empty result, a sum of 0 or a mean of NaN.
#[test]
fn dimensions_of_zero() -> Result<()> {
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

/// `forward_linear` with every subset of dimensions zero. Only zero classes is an error.
#[test]
fn dimensions_of_zero_in_forward_linear() -> Result<()> {
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
        // candle cannot multiply matrices with an inner dimension of zero. All logits are 0 then.
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

/// Sizes that no memory holds are errors, also for views of a single number. Without rows there is
/// nothing to compute, and other dimensions may be large.
#[test]
fn overflowing_sizes_are_errors() -> Result<()> {
    let zero = |dtype| Tensor::zeros((), dtype, &CPU);
    for dtype in dtypes() {
        for dims in [
            &[MAX_SIZE][..],
            &[1, MAX_SIZE],
            &[MAX_SIZE, 1],
            &[1 << 32, 1 << 32],
            &[1 << 31, 1 << 31],
            &[MAX_SIZE / 2, 2, 3],
            &[2, MAX_SIZE / 2 + 1],
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
        // Without elements, no size overflows.
        for dims in [&[0, 1 << 31][..], &[1 << 40, 0, 3]] {
            let logits = zero(dtype)?.broadcast_as(dims)?;
            let labels = zero(DType::U8)?.broadcast_as(&dims[..dims.len() - 1])?;
            let result = loss()?.with_reduction(Reduction::Sum).forward(&logits, &labels)?;
            assert_eq!(values(&result)?, [0.]);
        }
        let (logits, labels) = (zero(dtype)?.broadcast_as((0, MAX_SIZE))?, zero(DType::U8)?);
        let message = error(loss()?.forward(&logits, &labels.broadcast_as(0)?));
        assert!(message.contains("too large"), "{message}");
    }
    let labels = Tensor::zeros(1, DType::U32, &CPU)?;
    for num_classes in [MAX_SIZE, MAX_SIZE / 8, 1 << 60] {
        let message = error(smooth_targets(&labels, num_classes, &Smoothing::none()));
        assert!(message.contains("too large"), "{message}");
    }
    // The range check needs no memory for the classes.
    check_targets(&labels, MAX_SIZE, None)?;
    let hidden = zero(DType::F32)?.broadcast_as((1, 1))?;
    let weight = zero(DType::F32)?.broadcast_as((MAX_SIZE, 1))?;
    let message = error(loss()?.forward_linear(&hidden, &weight, None, &labels));
    assert!(message.contains("too large"), "{message}");
    Ok(())
}

/// The f16 gradient is infinite exactly where the f64 gradient rounds to infinity.
#[test]
fn f16_gradient_is_infinite_only_beyond_the_range_of_f16() -> Result<()> {
    let (rows, num_classes) = (3000, 7);
    let logits = random(&[rows, num_classes], 4., 1)?.to_dtype(DType::F16)?;
    // The gradients lie on both sides of 65504, the largest f16 number.
    let grad_output = random(&[rows], 3e5, 2)?.to_dtype(DType::F32)?;
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
                let grad_output = grad_output.to_dtype(result.dtype())?;
                let gradients = (result * grad_output)?.sum_all()?.backward()?;
                values(gradients.get(&logits).expect("no gradient"))
            };
            for (actual, exact) in gradient(DType::F16)?.into_iter().zip(gradient(DType::F64)?) {
                // 65520 and above round to infinity in f16. The terms are computed in f32 and reach
                // 2e6, so values very close to 65520 may round either way.
                let beyond = exact.abs() - 65520.;
                if beyond.abs() > 2e6 * 2f64.powi(-22) {
                    assert_eq!(actual.is_infinite(), beyond > 0., "{actual}, exactly {exact}");
                    assert!(!actual.is_nan() && (actual.signum() == exact.signum() || exact == 0.));
                    *if actual.is_infinite() { &mut infinite } else { &mut finite } += 1;
                }
            }
        }
    }
    assert!(finite > 10_000 && infinite > 10_000, "{finite} finite, {infinite} infinite");
    Ok(())
}
