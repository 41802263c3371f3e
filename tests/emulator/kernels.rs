//! GPU kernels with targets out of range, many rows and large offsets.
//!
//! The CPU returns an error for a target out of range. A GPU kernel cannot, so it sets the row to
//! NaN.

#[path = "../common/mod.rs"]
mod common;

use candle_core::{DType, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing};
use common::{CPU, OnDevice, dtypes, random, smooth_on_device, values};

/// Labels in and out of range for 5 classes, in every integer dtype.
fn targets_out_of_range() -> Result<Vec<Tensor>> {
    Ok(vec![
        Tensor::new(&[1u8, 5, 255, 4], &CPU)?,
        Tensor::new(&[1u32, 5, u32::MAX, 4], &CPU)?,
        Tensor::new(&[1i64, -1, 3, 4, 5, 0, i64::MIN, i64::MAX, -100, 1 << 32], &CPU)?,
        Tensor::from_vec(vec![1i16, -1, i16::MIN, i16::MAX, 4], 5, &CPU)?,
        Tensor::from_vec(vec![1i32, -1, i32::MIN, i32::MAX, 4], 5, &CPU)?,
    ])
}

fn is_class(target: &f64) -> bool {
    (0. ..5.).contains(target)
}

#[test]
fn target_out_of_range_makes_its_row_nan() -> Result<()> {
    let weights = Tensor::new(&[1f32, 2., 0.5, 1., 3.], &CPU)?;
    let plain = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let weighted = plain.clone().with_class_weights(&weights)?.with_z_loss(0.1)?;
    for targets in targets_out_of_range()? {
        let of_rows = values(&targets)?;
        let num_rows = of_rows.len();
        for dtype in dtypes() {
            for loss in [&plain, &weighted] {
                let name = format!("{dtype:?} {:?}", targets.dtype());
                for (dims, class_dim) in [([num_rows, 5], 1), ([5, num_rows], 0)] {
                    let loss = loss.clone().with_class_dim(class_dim);
                    let logits = Var::from_tensor(&random(&dims, 2., 1)?.to_dtype(dtype)?)?;
                    let rows = loss.clone().with_reduction(Reduction::None);
                    let losses = rows.on_device(&logits, &targets)?;
                    let gradients = losses.backward()?;
                    let gradient = gradients.get(&logits).expect("no gradient");
                    let gradient = if class_dim == 0 { gradient.t()? } else { gradient.clone() };
                    let gradient = values(&gradient)?;
                    for (row, (target, loss)) in of_rows.iter().zip(values(&losses)?).enumerate() {
                        assert_eq!(loss.is_nan(), !is_class(target), "{name}: {target}, {loss}");
                        for g in &gradient[row * 5..(row + 1) * 5] {
                            assert_eq!(g.is_nan(), !is_class(target), "{name}: {target}, {g}");
                        }
                    }
                    // The mean over all rows is NaN too.
                    assert!(values(&loss.on_device(&logits, &targets)?)?[0].is_nan(), "{name}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn ignore_index_out_of_range_has_zero_gradient() -> Result<()> {
    let logits = Var::from_tensor(&random(&[3, 5], 2., 1)?.to_dtype(DType::F32)?)?;
    let targets = Tensor::new(&[2i64, -100, 3], &CPU)?;
    let weights = Tensor::new(&[1f32, 2., 0.5, 1., 3.], &CPU)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?)
        .with_class_weights(&weights)?
        .with_ignore_index(-100);
    let result = loss.on_device(&logits, &targets)?;
    assert!(values(&result)?[0].is_finite());
    let gradients = result.backward()?;
    let gradient = values(gradients.get(&logits).expect("no gradient"))?;
    assert_eq!(gradient[5..10], [0.; 5]);
    assert!(gradient.iter().all(|g| g.is_finite()));
    Ok(())
}

#[test]
fn smooth_targets_of_labels_out_of_range_are_nan() -> Result<()> {
    for targets in targets_out_of_range()? {
        let soft = values(&smooth_on_device(&targets, 5, &Smoothing::over_others(0.1)?)?)?;
        for (target, soft) in values(&targets)?.iter().zip(soft.chunks(5)) {
            assert!(soft.iter().all(|s| s.is_nan() != is_class(target)), "{target}: {soft:?}");
        }
    }
    Ok(())
}

/// More rows than the second or third dimension of a grid allows, reduced by more than one group.
#[test]
fn many_rows_match_the_reference() -> Result<()> {
    let (num_rows, num_classes) = (70_000, 3);
    let logits = random(&[num_rows, num_classes], 3., 1)?.to_dtype(DType::F32)?;
    let targets = common::random_labels(&[num_rows], num_classes, 2)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_others(0.1)?).with_ignore_index(0);
    let variable = Var::from_tensor(&logits)?;
    let result = loss.on_device(&variable, &targets)?;
    let exact = Var::from_tensor(&logits.to_dtype(DType::F64)?)?;
    let reference = candle_label_smoothing::reference::forward(&loss, &exact, &targets)?;
    let (actual, expected) = (values(&result)?[0], values(&reference)?[0]);
    assert!((actual - expected).abs() < 2e-7 * expected, "{actual}, expected {expected}");
    let (actual, expected) = (result.backward()?, reference.backward()?);
    let actual = values(actual.get(&variable).expect("no gradient"))?;
    let expected = values(expected.get(&exact).expect("no gradient"))?;
    for (row, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        assert!(
            (actual - expected).abs() < 5e-7 / num_rows as f64,
            "{row}: {actual}, expected {expected}"
        );
    }
    Ok(())
}

/// Rows that begin more than 2³¹ elements into their storage. Most of the memory is reserved and
/// never touched.
#[test]
fn offsets_beyond_32_bits() -> Result<()> {
    let (num_classes, stride) = (300, (1 << 30) + 1000);
    if Vec::<f32>::new().try_reserve_exact(2 * stride).is_err() {
        println!("skipped: too little memory");
        return Ok(());
    }
    let far = Tensor::zeros((2, stride), DType::F32, &CPU)?;
    let near = random(&[2, num_classes], 3., 1)?.to_dtype(DType::F32)?;
    far.slice_set(&near, 1, stride - num_classes)?;
    let far = far.narrow(1, stride - num_classes, num_classes)?;
    let targets = Tensor::new(&[7u8, 200], &CPU)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let loss_far = values(&loss.on_device(&far, &targets)?)?;
    let loss_near = values(&loss.on_device(&near, &targets)?)?;
    common::assert_same("far", DType::F32, &loss_far, &loss_near);
    Ok(())
}
