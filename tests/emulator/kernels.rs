//! What the kernels of a GPU do where those of the CPU give an error: they cannot say that a target is no
//! class, and mark its row.

#[path = "../common/mod.rs"]
mod common;

use candle_core::{DType, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing};
use common::{CPU, OnDevice, dtypes, random, smooth_on_device, values};

/// Targets of 5 classes, each beside a good one.
fn outside() -> Result<Vec<Tensor>> {
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
fn a_target_that_is_no_class_makes_its_row_nan() -> Result<()> {
    let weights = Tensor::new(&[1f32, 2., 0.5, 1., 3.], &CPU)?;
    let plain = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let weighted = plain.clone().with_class_weights(&weights)?.with_z_loss(0.1)?;
    for targets in outside()? {
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
                    // And what is made of all rows.
                    assert!(values(&loss.on_device(&logits, &targets)?)?[0].is_nan(), "{name}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn ignored_targets_outside_the_range_are_ignored() -> Result<()> {
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
fn smoothed_targets_of_no_class_are_nan() -> Result<()> {
    for targets in outside()? {
        let soft = values(&smooth_on_device(&targets, 5, &Smoothing::over_others(0.1)?)?)?;
        for (target, soft) in values(&targets)?.iter().zip(soft.chunks(5)) {
            assert!(soft.iter().all(|s| s.is_nan() != is_class(target)), "{target}: {soft:?}");
        }
    }
    Ok(())
}

/// More rows than a grid's second or third dimension would hold, and more than one group adds up.
#[test]
fn many_rows() -> Result<()> {
    let (num_rows, num_classes) = (70_000, 3);
    let logits = random(&[num_rows, num_classes], 3., 1)?.to_dtype(DType::F32)?;
    let targets = common::random_labels(&[num_rows], num_classes, 2)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_others(0.1)?).with_ignore_index(0);
    let variable = Var::from_tensor(&logits)?;
    let result = loss.on_device(&variable, &targets)?;
    let exact = Var::from_tensor(&logits.to_dtype(DType::F64)?)?;
    let expected = candle_label_smoothing::reference::forward(&loss, &exact, &targets)?;
    let (ours, theirs) = (values(&result)?[0], values(&expected)?[0]);
    assert!((ours - theirs).abs() < 2e-7 * theirs, "{ours} and {theirs}");
    let (ours, theirs) = (result.backward()?, expected.backward()?);
    let ours = values(ours.get(&variable).expect("no gradient"))?;
    let theirs = values(theirs.get(&exact).expect("no gradient"))?;
    for (row, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
        assert!((ours - theirs).abs() < 5e-7 / num_rows as f64, "{row}: {ours} and {theirs}");
    }
    Ok(())
}

/// Rows that begin more than 2³¹ elements into their storage, in memory that is reserved and hardly
/// touched.
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
    let there = values(&loss.on_device(&far, &targets)?)?;
    let here = values(&loss.on_device(&near, &targets)?)?;
    common::assert_same("far", DType::F32, &there, &here);
    Ok(())
}
