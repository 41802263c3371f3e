//! Extreme and degenerate values: overflow, masks, NaN, ignored rows, and many classes or rows.

mod common;

use approx::{assert_abs_diff_eq, assert_relative_eq};
use candle_core::{DType, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing, check_targets, reference};
use common::{
    CPU, OnDevice, random, random_labels, random_probabilities, smooth_on_device, smoothings,
    values,
};

const INF: f64 = f64::INFINITY;
const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

/// The loss and the gradient for logits of shape (N, K). Also checks that the transposed logits,
/// with the classes first, give the same results.
fn run(
    loss: &LabelSmoothingLoss,
    logits: &Tensor,
    targets: &Tensor,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let (losses, gradient) = run_once(loss, logits, targets)?;
    let transposed = |t: &Tensor| t.t()?.contiguous();
    let transposed_targets =
        if targets.rank() == 2 { transposed(targets)? } else { targets.clone() };
    let transposed_loss = loss.clone().with_class_dim(0);
    let (transposed_losses, transposed_gradient) =
        run_once(&transposed_loss, &transposed(logits)?, &transposed_targets)?;

    // The order of the additions differs: 20 roundings within a block, and in f64 one more for each
    // block. Half types add a final rounding, in which the two results may round apart.
    let blocks = logits.dim(1)? as f64 / 32.;
    let (roundings, ulp) = match logits.dtype() {
        DType::F64 => ((20. + blocks) * 2f64.powi(-53), 0.),
        DType::F16 => (20. * 2f64.powi(-24), 2f64.powi(-10)),
        DType::BF16 => (20. * 2f64.powi(-24), 2f64.powi(-7)),
        _ => (20. * 2f64.powi(-24), 0.),
    };
    let close = |a: f64, b: f64, ulp: f64| {
        a == b
            || a.is_nan() && b.is_nan()
            || (a - b).abs() <= roundings * a.abs().max(1.) + ulp * a.abs()
    };
    for (a, b) in losses.iter().zip(&transposed_losses) {
        assert!(close(*a, *b, 0.), "loss {a}, classes first {b}");
    }
    let num_rows = logits.dim(0)?;
    for (i, b) in transposed_gradient.iter().enumerate() {
        let a = gradient[i % num_rows * logits.dim(1)? + i / num_rows];
        assert!(close(a, *b, ulp), "gradient {a}, classes first {b}");
    }
    Ok((losses, gradient))
}

fn run_once(
    loss: &LabelSmoothingLoss,
    logits: &Tensor,
    targets: &Tensor,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let logits = Var::from_tensor(logits)?;
    let loss = loss.on_device(&logits, targets)?;
    let gradients = loss.backward()?;
    let gradient = gradients.get(&logits).expect("no gradient");
    assert_eq!(gradient.dtype(), logits.dtype());
    Ok((values(&loss)?, values(gradient)?))
}

fn unreduced(smoothing: Smoothing) -> LabelSmoothingLoss {
    LabelSmoothingLoss::new(smoothing).with_reduction(Reduction::None)
}

#[test]
fn huge_logits_do_not_overflow() -> Result<()> {
    let logits =
        Tensor::new(&[[1e30f32, -1e30, 0.], [-1e30, -1e30, -1e30], [1e30, 1e30, 1e30]], &CPU)?;
    let labels = Tensor::new(&[0u32, 1, 2], &CPU)?;
    let (loss, gradient) = run(&unreduced(Smoothing::none()), &logits, &labels)?;
    let third = f64::from(3f32.ln());
    for (actual, expected) in loss.iter().zip([0., third, third]) {
        assert_abs_diff_eq!(*actual, expected, epsilon = 1e-7);
    }
    assert_eq!(gradient[..3], [0., 0., 0.]);
    assert!(gradient.iter().all(|g| g.is_finite()));

    // ε/K·(1e30 − 0) + ε/K·(1e30 + 1e30) = ε·1e30
    let (loss, _) = run(&unreduced(Smoothing::over_all(0.1)?), &logits, &labels)?;
    assert_relative_eq!(loss[0], 1e29, max_relative = 1e-6);
    // The square of logsumexp overflows f32.
    let with_z = unreduced(Smoothing::none()).with_z_loss(1e-4)?;
    let (loss, gradient) = run(&with_z, &logits, &labels)?;
    assert_eq!(loss, [INF; 3]);
    // Its derivative does not: 2·z·1e30.
    assert_relative_eq!(gradient[0], 2e26, max_relative = 1e-6);

    let logits = Tensor::new(&[[1e308f64, -1e308, 0.]], &CPU)?;
    let (loss, gradient) = run(&unreduced(Smoothing::none()), &logits, &labels.narrow(0, 0, 1)?)?;
    assert_eq!(loss, [0.]);
    assert_eq!(gradient, [0.; 3]);
    // Two blocks of classes whose maxima differ by more than the largest number.
    let logits = Tensor::cat(
        &[Tensor::full(-1.5e308, (1, 300), &CPU)?, Tensor::full(1.5e308, (1, 300), &CPU)?],
        1,
    )?;
    let label = Tensor::new(&[599u32], &CPU)?;
    let (loss, gradient) = run(&unreduced(Smoothing::none()), &logits, &label)?;
    assert_relative_eq!(loss[0], 300f64.ln(), max_relative = 1e-14);
    assert!(gradient.iter().all(|g| g.is_finite()));
    Ok(())
}

/// The logits are multiples of 1/16, so all differences are exact and the loss has the same bits.
#[test]
fn adding_a_constant_to_all_logits_keeps_the_bits_of_the_loss() -> Result<()> {
    let base = (random(&[4, 300], 8., 1)? * 16.)?.round()?.affine(1. / 16., 0.)?;
    let labels = random_labels(&[4], 300, 2)?;
    let probabilities = random_probabilities(&[4, 300], 1, 3)?;
    for (name, smoothing) in smoothings(300)? {
        for targets in [&labels, &probabilities] {
            for (dtype, offset) in [(DType::F32, 1e6), (DType::F64, 1e6), (DType::F64, -1e12)] {
                let shifted = base.affine(1., offset)?.to_dtype(dtype)?;
                let unshifted = base.to_dtype(dtype)?;
                assert_eq!(
                    run(&unreduced(smoothing.clone()), &shifted, targets)?.0,
                    run(&unreduced(smoothing.clone()), &unshifted, targets)?.0,
                    "{name} {dtype:?} {offset}"
                );
            }
        }
    }
    Ok(())
}

/// A logit of −inf masks a class. The loss is infinite if the class has a positive target, and
/// unaffected otherwise.
#[test]
fn loss_is_infinite_only_if_a_masked_class_has_a_positive_target() -> Result<()> {
    for dtype in DTYPES {
        let logits = Tensor::new(&[[-INF, 1., 2., -INF]], &CPU)?.to_dtype(dtype)?;
        let kept = Tensor::new(&[[1f64, 2.]], &CPU)?;
        let label = |class: u32| Tensor::new(&[class], &CPU);
        let expected = run(&unreduced(Smoothing::none()), &kept, &label(1)?)?;

        let (loss, gradient) = run(&unreduced(Smoothing::none()), &logits, &label(2)?)?;
        assert_relative_eq!(loss[0], expected.0[0], max_relative = 1e-7);
        assert_eq!((gradient[0], gradient[3]), (0., 0.));
        assert_abs_diff_eq!(gradient[1], expected.1[0], epsilon = 1e-3);

        // With a masked label, or smoothing over masked classes, the loss is infinite and the
        // gradient is still softmax − target.
        let (loss, gradient) = run(&unreduced(Smoothing::none()), &logits, &label(0)?)?;
        assert_eq!(loss, [INF]);
        assert_eq!((gradient[0], gradient[3]), (-1., 0.));
        let (loss, gradient) = run(&unreduced(Smoothing::over_all(0.5)?), &logits, &label(2)?)?;
        assert_eq!(loss, [INF]);
        assert_eq!((gradient[0], gradient[3]), (-0.125, -0.125));

        // The masked classes have target 0 because of a class weight, a prior or a probability of
        // 0, or because of `over_others(1)`.
        let weights = Tensor::new(&[0f64, 1., 1., 0.], &CPU)?;
        let weighted = unreduced(Smoothing::over_all(0.5)?).with_class_weights(&weights)?;
        assert!(run(&weighted, &logits, &label(2)?)?.0[0].is_finite());
        let prior = Tensor::new(&[0f64, 0.5, 0.5, 0.], &CPU)?;
        let toward = unreduced(Smoothing::toward(0.5, &prior)?);
        assert!(run(&toward, &logits, &label(2)?)?.0[0].is_finite());
        let probabilities = Tensor::new(&[[0f64, 0.5, 0.5, 0.]], &CPU)?;
        let loss = run(&unreduced(Smoothing::none()), &logits, &probabilities)?.0;
        let both = Tensor::new(&[[0.5f64, 0.5]], &CPU)?;
        let expected = run(&unreduced(Smoothing::none()), &kept, &both)?.0;
        assert_relative_eq!(loss[0], expected[0], max_relative = 1e-7);
        let logits = Tensor::new(&[[-INF, 1., 2.]], &CPU)?.to_dtype(dtype)?;
        let others = unreduced(Smoothing::over_others(1.)?);
        for targets in [label(0)?, Tensor::new(&[[1f64, 0., 0.]], &CPU)?] {
            let (loss, gradient) = run(&others, &logits, &targets)?;
            assert!(loss[0].is_finite(), "{loss:?}");
            assert_eq!(gradient[0], 0.);
        }
    }
    Ok(())
}

/// The index of the row makes no difference.
#[test]
fn one_infinite_row_loss_makes_sum_and_mean_infinite() -> Result<()> {
    let num_rows = 9000;
    for row in [0, 1, 100, 255, 256, 257, 4095, 4096, 5000, num_rows - 1] {
        for dtype in [DType::F32, DType::F64] {
            let mut logits = vec![0.5; num_rows * 2];
            logits[row * 2] = -INF;
            let logits = Tensor::from_vec(logits, (num_rows, 2), &CPU)?.to_dtype(dtype)?;
            let labels = Tensor::zeros(num_rows, DType::U32, &CPU)?;
            for reduction in [Reduction::Sum, Reduction::Mean] {
                let loss = LabelSmoothingLoss::new(Smoothing::none()).with_reduction(reduction);
                for loss in [loss.clone(), loss.with_ignore_index(1)] {
                    let loss = loss.on_device(&logits, &labels)?;
                    assert_eq!(values(&loss)?, [INF], "row {row} {dtype:?} {reduction:?}");
                }
            }
        }
    }
    Ok(())
}

/// The sum of the losses overflows f32.
#[test]
fn mean_is_finite_although_the_sum_overflows() -> Result<()> {
    let row = [f32::MIN, 1., 2., f32::MIN];
    let expected = 0.1 / 4. * 2. * -f64::from(f32::MIN);
    for num_rows in [1, 3, 64, 5000, 9000] {
        let logits = Tensor::new(&row, &CPU)?.broadcast_as((num_rows, 4))?;
        let labels = Tensor::ones(num_rows, DType::U32, &CPU)?;
        let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
        for loss in [loss.clone(), loss.with_ignore_index(0)] {
            let loss = loss.on_device(&logits, &labels)?;
            assert_relative_eq!(values(&loss)?[0], expected, max_relative = 1e-6);
        }
    }
    Ok(())
}

/// Transformers mask classes with the lowest number of the dtype to avoid −inf. Smoothing makes the
/// loss very large but finite, and the gradient is as for other logits.
#[test]
fn classes_masked_with_the_lowest_number_give_a_finite_loss() -> Result<()> {
    let lowest = [
        (DType::F64, f64::MIN),
        (DType::F32, f32::MIN.into()),
        (DType::BF16, half::bf16::MIN.to_f64()),
        (DType::F16, half::f16::MIN.to_f64()),
    ];
    for (dtype, lowest) in lowest {
        for num_classes in [2, 31, 32, 40, 64, 256, 1000, 20_000] {
            let kept = random(&[1, num_classes], 2., 7)?.to_dtype(dtype)?.to_dtype(DType::F64)?;
            let mut logits = values(&kept)?;
            logits[1..].iter_mut().step_by(2).for_each(|x| *x = lowest);
            let expected = (0.1 / num_classes as f64) * -lowest * (num_classes / 2) as f64;
            let logits = Tensor::from_vec(logits, (1, num_classes), &CPU)?.to_dtype(dtype)?;
            let label = Tensor::new(&[0u32], &CPU)?;
            let (loss, gradient) = run(&unreduced(Smoothing::over_all(0.1)?), &logits, &label)?;
            let tolerance = if dtype == DType::F16 { 1e-2 } else { 1e-5 };
            assert_relative_eq!(loss[0], expected, max_relative = tolerance);
            let r = 0.1 / num_classes as f64;
            for gradient in gradient[1..].iter().step_by(2) {
                assert_relative_eq!(*gradient, -r, max_relative = 5e-3, epsilon = 1e-7);
            }
        }
    }
    Ok(())
}

/// The mask covers whole blocks of classes before and after the remaining classes.
#[test]
fn masked_blocks_change_nothing_and_hide_no_nan() -> Result<()> {
    let kept = random(&[1, 10], 2., 1)?;
    let masked = Tensor::full(-INF, (1, 40_000), &CPU)?;
    let logits = Tensor::cat(&[&masked, &kept, &masked], 1)?;
    let (loss, gradient) =
        run(&unreduced(Smoothing::none()), &logits, &Tensor::new(&[40_003u32], &CPU)?)?;
    let (expected, expected_gradient) =
        run(&unreduced(Smoothing::none()), &kept, &Tensor::new(&[3u32], &CPU)?)?;
    assert_relative_eq!(loss[0], expected[0], max_relative = 1e-14);
    for (actual, expected) in gradient[40_000..40_010].iter().zip(expected_gradient) {
        assert_abs_diff_eq!(*actual, expected, epsilon = 1e-15);
    }
    assert!(gradient[..40_000].iter().all(|g| *g == 0.));

    // A NaN in a block of masked classes makes the row NaN.
    let nan = Tensor::full(f64::NAN, (1, 1), &CPU)?;
    let logits = Tensor::cat(&[&nan, &masked, &kept, &masked], 1)?;
    let label = Tensor::new(&[40_004u32], &CPU)?;
    let (loss, gradient) = run(&unreduced(Smoothing::none()), &logits, &label)?;
    assert!(loss[0].is_nan() && gradient.iter().all(|g| g.is_nan()));
    Ok(())
}

/// PyTorch gives NaN for these rows too.
#[test]
fn rows_with_undefined_softmax_are_nan() -> Result<()> {
    for dtype in DTYPES {
        for row in [[-INF, -INF, -INF], [INF, 0., 0.], [f64::NAN, 0., 0.]] {
            let logits = Tensor::new(&[row, [0., 1., 2.]], &CPU)?.to_dtype(dtype)?;
            let labels = Tensor::new(&[0u32, 0], &CPU)?;
            for smoothing in [Smoothing::none(), Smoothing::over_all(0.1)?] {
                let (loss, gradient) = run(&unreduced(smoothing), &logits, &labels)?;
                assert!(loss[0].is_nan(), "{row:?}: {loss:?}");
                assert!(gradient[..3].iter().all(|g| g.is_nan()), "{row:?}: {gradient:?}");
                // The other row is unaffected.
                assert!(loss[1].is_finite() && gradient[3..].iter().all(|g| g.is_finite()));
            }
        }
    }
    Ok(())
}

#[test]
fn ignored_rows_have_zero_loss_and_gradient() -> Result<()> {
    for dtype in DTYPES {
        for row in [[f64::NAN; 3], [INF; 3], [-INF; 3], [f64::NAN, INF, -INF]] {
            let logits = Tensor::new(&[row, [0., 1., 2.]], &CPU)?.to_dtype(dtype)?;
            let labels = Tensor::new(&[-100i64, 0], &CPU)?;
            let prior = Tensor::new(&[0.5f64, 0.25, 0.25], &CPU)?;
            let loss = LabelSmoothingLoss::new(Smoothing::toward(0.1, &prior)?)
                .with_class_weights(&prior)?
                .with_z_loss(0.1)?
                .with_ignore_index(-100);
            for reduction in [Reduction::None, Reduction::Sum, Reduction::Mean] {
                let loss = loss.clone().with_reduction(reduction);
                let (loss, gradient) = run(&loss, &logits, &labels)?;
                if reduction == Reduction::None {
                    assert_eq!(loss[0], 0.);
                }
                assert!(loss.iter().all(|l| l.is_finite()));
                assert_eq!(gradient[..3], [0.; 3]);
                assert!(gradient[3..].iter().all(|g| g.is_finite() && *g != 0.));
            }
        }
    }
    Ok(())
}

#[test]
fn ignoring_all_rows_gives_nan_mean_and_zero_gradient() -> Result<()> {
    let logits = random(&[2, 3], 1., 1)?;
    let labels = Tensor::new(&[7i64, 7], &CPU)?;
    for (reduction, expected) in [
        (Reduction::None, vec![0., 0.]),
        (Reduction::Sum, vec![0.]),
        (Reduction::Mean, vec![f64::NAN]),
    ] {
        let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?)
            .with_ignore_index(7)
            .with_reduction(reduction);
        let (loss, gradient) = run(&loss, &logits, &labels)?;
        assert!(loss == expected || loss[0].is_nan() && expected[0].is_nan(), "{loss:?}");
        assert_eq!(gradient, [0.; 6]);
    }
    Ok(())
}

/// An empty view may begin beyond the end of its storage.
#[test]
fn empty_views_have_a_nan_mean() -> Result<()> {
    let empty = |dtype| Tensor::zeros((0, 3), dtype, &CPU)?.narrow(1, 1, 2);
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    for dtype in DTYPES {
        let base = Var::from_tensor(&Tensor::zeros((0, 3), dtype, &CPU)?)?;
        let logits = base.narrow(1, 1, 2)?;
        for targets in [DType::U8, DType::I16, DType::I32, DType::F8E4M3, DType::F64] {
            let mut targets = empty(targets)?;
            if targets.dtype().is_int() {
                targets = targets.narrow(1, 1, 1)?.squeeze(1)?;
                check_targets(&targets, 2, None)?;
            }
            smooth_on_device(&targets, 2, &Smoothing::none())?;
            let loss = loss.on_device(&logits, &targets)?;
            assert!(values(&loss)?[0].is_nan());
            assert!(loss.backward()?.get(&base).is_some());
        }
    }
    let weights = Tensor::zeros((3, 0), DType::F32, &CPU)?.narrow(0, 1, 1)?.squeeze(0)?;
    assert!(loss.clone().with_class_weights(&weights).is_ok());
    assert!(Smoothing::toward(0.1, &weights).is_err());
    Ok(())
}

/// A single class has probability 1 whatever its logit.
#[test]
fn single_class_loss_is_the_z_loss_alone() -> Result<()> {
    let logits = Tensor::new(&[[5f64], [-3.]], &CPU)?;
    let labels = Tensor::new(&[0u32, 0], &CPU)?;
    let (loss, gradient) = run(&unreduced(Smoothing::over_all(0.3)?), &logits, &labels)?;
    assert_eq!((loss, gradient), (vec![0., 0.], vec![0., 0.]));
    let with_z = unreduced(Smoothing::none()).with_z_loss(0.5)?;
    let (loss, gradient) = run(&with_z, &logits, &labels)?;
    assert_eq!((loss, gradient), (vec![12.5, 4.5], vec![5., -3.]));
    Ok(())
}

/// ε = 0 gives plain cross-entropy. With ε = 1 the loss does not depend on the label, except for
/// `over_others`.
#[test]
fn epsilon_zero_is_cross_entropy_and_epsilon_one_drops_the_label() -> Result<()> {
    let logits = random(&[4, 5], 3., 1)?;
    let prior = random_probabilities(&[5], 0, 4)?;
    let labels = random_labels(&[4], 5, 2)?;
    let other = labels
        .affine(1., 1.)?
        .eq(5i64)?
        .where_cond(&labels.zeros_like()?, &labels.affine(1., 1.)?)?;
    let plain = run(&unreduced(Smoothing::none()), &logits, &labels)?;
    for smoothing in [Smoothing::over_all, Smoothing::over_others] {
        assert_eq!(run(&unreduced(smoothing(0.)?), &logits, &labels)?, plain);
    }
    assert_eq!(run(&unreduced(Smoothing::toward(0., &prior)?), &logits, &labels)?, plain);
    for smoothing in [Smoothing::over_all(1.)?, Smoothing::toward(1., &prior)?] {
        assert_eq!(
            run(&unreduced(smoothing.clone()), &logits, &labels)?,
            run(&unreduced(smoothing), &logits, &other)?
        );
    }
    // With `over_others(1)` the label's logit counts only in logsumexp.
    let (loss, _) = run(&unreduced(Smoothing::over_others(1.)?), &logits, &labels)?;
    let (x, y) = (logits.to_vec2::<f64>()?, labels.to_vec1::<i64>()?);
    for (row, loss) in loss.iter().enumerate() {
        let lse = x[row].iter().map(|x| x.exp()).sum::<f64>().ln();
        let others: f64 = x[row].iter().sum::<f64>() - x[row][y[row] as usize];
        assert_relative_eq!(*loss, lse - others / 4., max_relative = 1e-13);
    }
    Ok(())
}

/// With `over_others(1)` the label has the target 0: however far below the others its logit is, it takes no digits from the sum.
#[test]
fn a_distant_logit_of_target_0_takes_no_digits_from_the_loss() -> Result<()> {
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F64, 1e-13)] {
        for num_classes in [16, 40, 256, 1000] {
            let mut x: Vec<f64> = (0..num_classes).map(|i| (i % 7) as f64).collect();
            x[3] = -1e6;
            let logits = Tensor::new(vec![x.clone()], &CPU)?.to_dtype(dtype)?;
            let labels = Tensor::new(&[3u32], &CPU)?;
            let loss = run(&unreduced(Smoothing::over_others(1.)?), &logits, &labels)?.0[0];
            let lse = x.iter().map(|x| x.exp()).sum::<f64>().ln();
            let others = x.iter().sum::<f64>() - x[3];
            let expected = lse - others / (num_classes - 1) as f64;
            assert_relative_eq!(loss, expected, max_relative = tolerance);
        }
    }
    Ok(())
}

/// Both the loss and the reference match the formula, written out here.
#[test]
fn probabilities_with_smoothing_weights_and_z_loss_match_the_formula() -> Result<()> {
    let x = [0.5f64, -1., 2.];
    let p = [0.2f64, 0.5, 0.3];
    let w = [1f64, 0.5, 2.];
    let prior = [0.6f64, 0.3, 0.1];
    let (epsilon, z) = (0.25, 0.01);
    let tensor = |v: &[f64; 3]| Tensor::new(v, &CPU);
    let smoothings_and_targets: [(Smoothing, [f64; 3]); 3] = [
        (Smoothing::over_all(epsilon)?, p.map(|p| (1. - epsilon) * p + epsilon / 3.)),
        (Smoothing::over_others(epsilon)?, p.map(|p| (1. - epsilon) * p + epsilon * (1. - p) / 2.)),
        (
            Smoothing::toward(epsilon, &tensor(&prior)?)?,
            std::array::from_fn(|k| (1. - epsilon) * p[k] + epsilon * prior[k]),
        ),
    ];
    let lse = x.iter().map(|x| x.exp()).sum::<f64>().ln();
    for (smoothing, q) in smoothings_and_targets {
        let expected: f64 = (0..3).map(|k| w[k] * q[k] * (lse - x[k])).sum::<f64>() + z * lse * lse;
        let loss =
            LabelSmoothingLoss::new(smoothing).with_class_weights(&tensor(&w)?)?.with_z_loss(z)?;
        let actual = loss.on_device(&tensor(&x)?, &tensor(&p)?)?;
        assert_relative_eq!(actual.to_scalar::<f64>()?, expected, max_relative = 1e-14);
        let from_reference = reference::forward(&loss, &tensor(&x)?, &tensor(&p)?)?;
        assert_relative_eq!(from_reference.to_scalar::<f64>()?, expected, max_relative = 1e-14);
    }
    Ok(())
}

/// In bf16, 1 − softmax rounds to 0. The gradient keeps its digits because only the result is
/// rounded to bf16.
#[test]
fn confident_correct_prediction_has_a_nonzero_gradient_in_half_types() -> Result<()> {
    for dtype in [DType::BF16, DType::F16] {
        let logits = Tensor::new(&[[10f64, 0., 1., 0.5]], &CPU)?.to_dtype(dtype)?;
        let label = Tensor::new(&[0u32], &CPU)?;
        let (_, gradient) = run(&unreduced(Smoothing::none()), &logits, &label)?;
        let (_, exact) = run(&unreduced(Smoothing::none()), &logits.to_dtype(DType::F64)?, &label)?;
        let tolerance = if dtype == DType::BF16 { 256. } else { 2048. };
        for (actual, exact) in gradient.iter().zip(exact) {
            // Half an ulp of the result, and the 6e-8 that f32 rounds in the label's 1 − 0.99976.
            assert_abs_diff_eq!(*actual, exact, epsilon = exact.abs() / tolerance + 6e-8);
            assert!(*actual != 0.);
        }
    }
    Ok(())
}

/// Gradients too small for f16 become 0, never NaN or infinite.
#[test]
fn small_gradients_in_f16_are_rounded_once() -> Result<()> {
    let logits = random(&[64, 2000], 3., 1)?.to_dtype(DType::F16)?;
    let labels = random_labels(&[64], 2000, 2)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let (_, gradient) = run(&loss, &logits, &labels)?;
    let (_, exact) = run(&loss, &logits.to_dtype(DType::F64)?, &labels)?;
    // Half of the smallest step of f16, and half an ulp of larger values.
    for (actual, exact) in gradient.iter().zip(exact) {
        assert_abs_diff_eq!(*actual, exact, epsilon = 2f64.powi(-25) + exact.abs() / 2000.);
    }
    Ok(())
}

/// Gradients half way between two numbers of a half type are rounded to the one whose last digit is 0.
#[test]
fn gradients_between_two_numbers_are_rounded_to_even() -> Result<()> {
    let label = Tensor::new(&[0u32], &CPU)?;
    for (dtype, ulp) in [(DType::BF16, 2f64.powi(-7)), (DType::F16, 2f64.powi(-10))] {
        for num_classes in [2, 16, 256] {
            for (exact, rounded) in [(1. + ulp / 2., 1.), (1. + 1.5 * ulp, 1. + 2. * ulp)] {
                // The softmax of each class is exact.
                let logits = Tensor::zeros((1, num_classes), dtype, &CPU)?;
                let logits = Var::from_tensor(&logits)?;
                let loss = unreduced(Smoothing::none()).on_device(&logits, &label)?;
                let gradients = (loss * (exact * num_classes as f64))?.sum_all()?.backward()?;
                let gradient = values(gradients.get(&logits).expect("no gradient"))?;
                assert!(
                    gradient[1..].iter().all(|g| *g == rounded),
                    "{dtype:?} {num_classes}: {gradient:?}, expected {rounded}"
                );
            }
        }
    }
    Ok(())
}

/// A block of 256 classes is summed in f32 with at most twenty additions in sequence. The block
/// sums are added in f64, so precision does not depend on the number of classes.
#[test]
fn many_classes_lose_no_precision() -> Result<()> {
    let num_classes = 200_000;
    let logits = random(&[2, num_classes], 5., 1)?;
    let labels = Tensor::new(&[199_999u32, 3], &CPU)?;
    for (name, smoothing) in smoothings(num_classes)? {
        let exact = {
            let logits = Var::from_tensor(&logits.to_dtype(DType::F32)?.to_dtype(DType::F64)?)?;
            let loss = reference::forward(&unreduced(smoothing.clone()), &logits, &labels)?;
            let gradients = loss.sum_all()?.backward()?;
            (values(&loss)?, values(gradients.get(&logits).expect("no gradient"))?)
        };
        for (dtype, epsilon) in [(DType::F64, 1e-11), (DType::F32, 20. * 2f64.powi(-24))] {
            let logits = logits.to_dtype(DType::F32)?.to_dtype(dtype)?;
            let (loss, gradient) = run_once(&unreduced(smoothing.clone()), &logits, &labels)?;
            for (actual, exact) in loss.iter().zip(&exact.0) {
                assert!(
                    (actual - exact).abs() < epsilon * exact,
                    "{name}: {actual}, exact {exact}"
                );
            }
            for (actual, exact) in gradient.iter().zip(&exact.1) {
                // Some roundings of the gradient's own size, or of the two terms where they nearly
                // cancel.
                let terms = exact.abs() + 2e-5;
                assert!(
                    (actual - exact).abs() < epsilon * terms,
                    "{name}: {actual}, exact {exact}"
                );
            }
        }
    }
    Ok(())
}

/// An f32 sum of a million row losses would lose half of its digits.
#[test]
fn many_rows_lose_no_precision() -> Result<()> {
    let logits = random(&[1_000_000, 2], 5., 1)?.to_dtype(DType::F32)?;
    let labels = random_labels(&[1_000_000], 2, 2)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    for loss in [loss.clone(), loss.with_ignore_index(1)] {
        let actual = loss.on_device(&logits, &labels)?.to_scalar::<f32>()?;
        let exact = reference::forward(&loss, &logits.to_dtype(DType::F64)?, &labels)?;
        assert_relative_eq!(f64::from(actual), exact.to_scalar::<f64>()?, max_relative = 1e-7);
    }
    Ok(())
}

#[test]
fn huge_z_loss_of_zero_logsumexp_is_finite() -> Result<()> {
    let logits = Var::from_tensor(&Tensor::new(&[[-(2f64.ln()); 2]], &CPU)?)?;
    let loss = LabelSmoothingLoss::new(Smoothing::none()).with_z_loss(1e308)?;
    let loss = loss.forward(&logits, &Tensor::new(&[0u32], &CPU)?)?;
    assert!((loss.to_scalar::<f64>()? - 2f64.ln()).abs() < 1e-12);
    let gradients = loss.backward()?;
    let gradient = gradients.get(&logits).expect("no gradient");
    assert_eq!(gradient.to_vec2::<f64>()?, [[-0.5, 0.5]]);
    Ok(())
}
