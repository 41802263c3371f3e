//! The effect of each option: smoothing, masks, class weights, row weights, ignore_index, z-loss, scale, softcap, reduction and
//! dtype.

mod common;

use approx::{assert_abs_diff_eq, assert_relative_eq};
use candle_core::{DType, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing, check_targets};
use common::{
    CPU, OnDevice, dtypes, fewer_where_slow, grid, random, random_labels, random_probabilities,
    smooth_on_device, smoothings, unreduced, values,
};

const INF: f64 = f64::INFINITY;
const NAN: f64 = f64::NAN;
const REDUCTIONS: [Reduction; 4] =
    [Reduction::None, Reduction::Sum, Reduction::Mean, Reduction::MeanOrZero];

fn assert_close(name: &str, actual: &Tensor, expected: &Tensor, epsilon: f64) -> Result<()> {
    assert_eq!(actual.dims(), expected.dims(), "{name}");
    assert_eq!(actual.dtype(), expected.dtype(), "{name}");
    for (actual, expected) in values(actual)?.iter().zip(values(expected)?) {
        // The mean over no rows is NaN in both.
        assert!(
            (actual - expected).abs() <= epsilon || actual.is_nan() && expected.is_nan(),
            "{name}: {actual}, expected {expected} differ by more than {epsilon}"
        );
    }
    Ok(())
}

/// The loss and the reference compute one formula in two ways. In f64 and f32 they differ by some
/// roundings of numbers of order ten. Gradients of half types differ by one more rounding, half an
/// ulp on either side. Their size is at most 1, plus some 5 percent with z-loss.
#[test]
fn every_combination_of_options_matches_the_reference() -> Result<()> {
    for (dtype, loss_epsilon, gradient_epsilon) in [
        (DType::F64, 1e-13, 1e-14),
        (DType::F32, 4e-6, 4e-7),
        (DType::F16, 4e-6, 4e-7 + 0.5 / 1024.),
        (DType::BF16, 4e-6, 4e-7 + 0.5 / 128.),
    ] {
        let cases = [grid(&[5, 7], 1)?, grid(&[2, 5, 2, 3], 1)?, grid(&[4], 0)?].concat();
        for case in fewer_where_slow(cases) {
            let (loss, gradient) = case.run(dtype)?;
            let (expected, expected_gradient) = case.run_reference(dtype)?;
            let name = format!("{dtype:?} {}", case.name);
            assert_close(&name, &loss, &expected, loss_epsilon)?;
            assert_close(&name, &gradient, &expected_gradient, gradient_epsilon)?;
        }
    }
    Ok(())
}

#[test]
fn loss_is_f32_or_f64_and_gradient_has_the_dtype_of_the_logits() -> Result<()> {
    let case = &grid(&[3, 4], 1)?[0];
    for (logits, loss) in [
        (DType::F64, DType::F64),
        (DType::F32, DType::F32),
        (DType::F16, DType::F32),
        (DType::BF16, DType::F32),
    ] {
        let (result, gradient) = case.run(logits)?;
        assert_eq!(result.dtype(), loss);
        assert_eq!(gradient.dtype(), logits);
        assert_eq!(gradient.dims(), [3, 4]);
    }
    Ok(())
}

#[test]
fn loss_has_the_shape_of_the_rows_or_is_a_scalar() -> Result<()> {
    let loss = LabelSmoothingLoss::new(Smoothing::none());
    for (dims, class_dim, rows) in [
        (&[5][..], None, &[][..]),
        (&[4, 5], None, &[4]),
        (&[2, 3, 5], None, &[2, 3]),
        (&[2, 5, 3, 4], Some(1), &[2, 3, 4]),
        (&[5, 4], Some(0), &[4]),
        (&[1, 5, 1], Some(1), &[1, 1]),
        (&[2, 1, 2, 5, 3, 2], Some(3), &[2, 1, 2, 3, 2]),
    ] {
        let loss = class_dim.map_or(loss.clone(), |dim| loss.clone().with_class_dim(dim));
        let logits = random(dims, 1., 1)?;
        let labels = random_labels(rows, 5, 2)?;
        for (reduction, expected) in
            [(Reduction::None, rows), (Reduction::Sum, &[]), (Reduction::Mean, &[])]
        {
            let result = loss.clone().with_reduction(reduction).on_device(&logits, &labels)?;
            assert_eq!(result.dims(), expected, "{dims:?} {reduction:?}");
        }
    }
    Ok(())
}

#[test]
fn without_smoothing_matches_candle_nn_cross_entropy() -> Result<()> {
    let logits = random(&[20, 10], 5., 1)?;
    let labels = random_labels(&[20], 10, 2)?;
    let expected = candle_nn::loss::cross_entropy(&logits, &labels)?.to_scalar::<f64>()?;
    for smoothing in [Smoothing::none(), Smoothing::over_all(0.)?, Smoothing::over_others(0.)?] {
        let actual =
            LabelSmoothingLoss::new(smoothing).on_device(&logits, &labels)?.to_scalar::<f64>()?;
        assert_relative_eq!(actual, expected, epsilon = 1e-14);
    }
    Ok(())
}

#[test]
fn over_others_is_over_all_of_a_larger_epsilon() -> Result<()> {
    let logits = random(&[6, 4], 3., 1)?;
    let labels = random_labels(&[6], 4, 2)?;
    let probabilities = random_probabilities(&[6, 4], 1, 3)?;
    for targets in [&labels, &probabilities] {
        let loss = |smoothing| -> Result<f64> {
            LabelSmoothingLoss::new(smoothing).on_device(&logits, targets)?.to_scalar::<f64>()
        };
        let others = loss(Smoothing::over_others(0.3)?)?;
        let all = loss(Smoothing::over_all(0.3 * 4. / 3.)?)?;
        assert_relative_eq!(others, all, epsilon = 1e-14);
    }
    Ok(())
}

#[test]
fn uniform_prior_matches_over_all() -> Result<()> {
    let logits = random(&[6, 4], 3., 1)?;
    let labels = random_labels(&[6], 4, 2)?;
    let prior = Tensor::new(&[0.25f32; 4], &CPU)?;
    let [all, toward] = [Smoothing::over_all(0.3)?, Smoothing::toward(0.3, &prior)?];
    let all = LabelSmoothingLoss::new(all).on_device(&logits, &labels)?;
    let toward = LabelSmoothingLoss::new(toward).on_device(&logits, &labels)?;
    assert_relative_eq!(all.to_scalar::<f64>()?, toward.to_scalar::<f64>()?, epsilon = 1e-15);
    Ok(())
}

/// A prior whose sum is slightly off 1 is divided by its sum.
#[test]
fn prior_is_normalised() -> Result<()> {
    let prior = Tensor::new(&[0.2501f64, 0.5, 0.25], &CPU)?;
    let labels = Tensor::new(&[0u32], &CPU)?;
    let soft = smooth_on_device(&labels, 3, &Smoothing::toward(1., &prior)?)?;
    let sum = 0.2501 + 0.5 + 0.25;
    let expected = [0.2501 / sum, 0.5 / sum, 0.25 / sum];
    for (actual, expected) in values(&soft)?.iter().zip(expected) {
        assert_abs_diff_eq!(*actual, expected, epsilon = 1e-7);
    }
    Ok(())
}

#[test]
fn labels_of_every_integer_dtype_give_the_same_loss() -> Result<()> {
    let logits = random(&[6, 4], 3., 1)?;
    let labels = random_labels(&[6], 4, 2)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_others(0.1)?).with_ignore_index(2);
    let expected = loss.on_device(&logits, &labels)?.to_scalar::<f64>()?;
    for dtype in [DType::U8, DType::U32, DType::I16, DType::I32, DType::I64] {
        let labels = labels.to_dtype(dtype)?;
        let actual = loss.on_device(&logits, &labels)?.to_scalar::<f64>()?;
        assert_eq!(actual, expected, "{dtype:?}");
        check_targets(&labels, 4, None)?;
        smooth_on_device(&labels, 4, &Smoothing::none())?;
    }
    Ok(())
}

/// One-hot probabilities of every dtype, with logits of every dtype.
#[test]
fn one_hot_probabilities_match_labels() -> Result<()> {
    let logits = random(&[6, 4], 3., 1)?;
    let labels = random_labels(&[6], 4, 2)?;
    let weights = Tensor::new(&[0.5f32, 2., 0., 1.], &CPU)?;
    for (name, smoothing) in smoothings(4)? {
        let one_hot = smooth_on_device(&labels, 4, &Smoothing::none())?;
        let loss = LabelSmoothingLoss::new(smoothing)
            .with_reduction(Reduction::None)
            .with_class_weights(&weights)?;
        for logits_dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            let logits = logits.to_dtype(logits_dtype)?;
            let expected = loss.on_device(&logits, &labels)?;
            for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16, DType::F8E4M3] {
                let actual = loss.on_device(&logits, &one_hot.to_dtype(dtype)?)?;
                // A label uses a precomputed coefficient, a probability a sum of two.
                let epsilon = if logits_dtype == DType::F64 { 1e-14 } else { 1e-5 };
                assert_close(&format!("{name} {dtype:?}"), &actual, &expected, epsilon)?;
            }
        }
    }
    Ok(())
}

/// Among the numbers of f8 are small ones with fewer digits, negative ones and NaN.
#[test]
fn probabilities_in_f8_have_their_values() -> Result<()> {
    let ulp = 1. / 512.;
    let rows = [[ulp, 7. * ulp, 8. * ulp, -0.5, 0.4375, 1.75, 0.], [ulp, 0., 0., 0., 0., 0., NAN]];
    let probabilities = Tensor::new(&rows, &CPU)?.to_dtype(DType::F32)?;
    let loss = unreduced(Smoothing::over_all(0.1)?);
    for dtype in dtypes() {
        let logits = random(&[2, 7], 3., 1)?.to_dtype(dtype)?;
        let expected = run(&loss, None, &logits, &probabilities)?;
        let actual = run(&loss, None, &logits, &probabilities.to_dtype(DType::F8E4M3)?)?;
        let name = format!("{dtype:?}");
        assert_near(&name, &actual.0[..1], &expected.0[..1], roundings(dtype));
        assert_near(&name, &actual.1[..7], &expected.1[..7], roundings(dtype));
        assert!(actual.0[1].is_nan() && actual.1[7..].iter().all(|g| g.is_nan()), "{name}");
    }
    Ok(())
}

/// The result of `smooth_targets` equals the smoothed targets of the loss.
#[test]
fn smooth_targets_as_probabilities_give_the_same_loss() -> Result<()> {
    let logits = random(&[2, 3, 4], 3., 1)?;
    let labels = random_labels(&[2, 3], 4, 2)?;
    let probabilities = random_probabilities(&[2, 3, 4], 2, 3)?;
    let plain = LabelSmoothingLoss::new(Smoothing::none());
    for (name, smoothing) in smoothings(4)? {
        let loss = LabelSmoothingLoss::new(smoothing.clone());
        for targets in [&labels, &probabilities] {
            let soft = smooth_on_device(targets, 4, &smoothing)?;
            assert_eq!(soft.dims(), [2, 3, 4]);
            assert_eq!(soft.dtype(), DType::F32);
            for sum in values(&soft.sum(2)?)? {
                assert_abs_diff_eq!(sum, 1., epsilon = 4e-7);
            }
            let actual = loss.on_device(&logits, targets)?.to_scalar::<f64>()?;
            let expected = plain.on_device(&logits, &soft)?.to_scalar::<f64>()?;
            assert!((actual - expected).abs() < 1e-6, "{name}: {actual}, expected {expected}");
        }
    }
    Ok(())
}

#[test]
fn smooth_targets_of_scalars_empty_batches_and_views() -> Result<()> {
    let others = Smoothing::over_others(0.1)?;
    let one = smooth_on_device(&Tensor::new(1u8, &CPU)?, 3, &others)?;
    assert_eq!(one.to_vec1::<f32>()?, [0.05, 0.9, 0.05]);

    let none = Tensor::zeros((2, 0), DType::I64, &CPU)?;
    assert_eq!(smooth_on_device(&none, 3, &others)?.dims(), [2, 0, 3]);

    // Probabilities in a transposed view, as from mixup.
    let mixed = Tensor::new(&[[0.7f32, 0.5], [0.3, 0.5]], &CPU)?.t()?;
    let soft = smooth_on_device(&mixed, 2, &Smoothing::over_all(0.2)?)?;
    for (actual, expected) in values(&soft)?.iter().zip([0.66, 0.34, 0.5, 0.5]) {
        assert_abs_diff_eq!(*actual, expected, epsilon = 1e-7);
    }
    Ok(())
}

/// Class weights and priors of every float dtype, and strided views of them.
#[test]
fn class_weights_and_priors_may_have_any_dtype_and_layout() -> Result<()> {
    let logits = random(&[4, 4], 2., 1)?;
    let labels = random_labels(&[4], 4, 2)?;
    // The first column is exact in every dtype. The second column makes the view strided.
    let table = Tensor::new(&[[0.5f32, -7.], [0.25, -7.], [0.125, -7.], [0.125, -7.]], &CPU)?;
    let run = |vector: &Tensor| -> Result<f64> {
        LabelSmoothingLoss::new(Smoothing::toward(0.3, vector)?)
            .with_class_weights(vector)?
            .on_device(&logits, &labels)?
            .to_scalar::<f64>()
    };
    let expected = run(&Tensor::new(&[0.5f32, 0.25, 0.125, 0.125], &CPU)?)?;
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16, DType::F8E4M3] {
        let vector = table.to_dtype(dtype)?.narrow(1, 0, 1)?.squeeze(1)?;
        assert_eq!(run(&vector)?, expected, "{dtype:?}");
    }
    Ok(())
}

/// As in PyTorch, labels divide the sum by Σ w_y over the rows that are not ignored.
#[test]
fn mean_divides_by_the_weights_of_the_targets() -> Result<()> {
    let logits = random(&[4, 3], 2., 1)?;
    let labels = Tensor::new(&[0i64, 2, 1, 2], &CPU)?;
    let weights = Tensor::new(&[0.5f64, 3., 2.], &CPU)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.2)?)
        .with_class_weights(&weights)?
        .with_ignore_index(1)
        .with_z_loss(0.1)?;
    let sum = loss.clone().with_reduction(Reduction::Sum);
    let sum = sum.on_device(&logits, &labels)?.to_scalar::<f64>()?;
    let mean = loss.on_device(&logits, &labels)?.to_scalar::<f64>()?;
    assert_relative_eq!(mean, sum / (0.5 + 2. + 2.), epsilon = 1e-15);

    // Probabilities divide the sum by the number of rows, whatever the class weights.
    let probabilities = random_probabilities(&[4, 3], 1, 3)?;
    let loss = LabelSmoothingLoss::new(Smoothing::none()).with_class_weights(&weights)?;
    let sum = loss.clone().with_reduction(Reduction::Sum);
    let sum = sum.on_device(&logits, &probabilities)?.to_scalar::<f64>()?;
    let mean = loss.on_device(&logits, &probabilities)?.to_scalar::<f64>()?;
    assert_relative_eq!(mean, sum / 4., epsilon = 1e-15);
    Ok(())
}

#[test]
fn ignoring_a_row_equals_removing_it() -> Result<()> {
    let logits = random(&[3, 4], 2., 1)?;
    let labels = Tensor::new(&[1i64, -100, 3], &CPU)?;
    let rest = Tensor::new(&[0u32, 2], &CPU)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_z_loss(0.01)?;
    let ignoring = loss.clone().with_ignore_index(-100);
    for reduction in [Reduction::Sum, Reduction::Mean] {
        let actual = ignoring.clone().with_reduction(reduction).on_device(&logits, &labels)?;
        let expected = loss
            .clone()
            .with_reduction(reduction)
            .on_device(&logits.index_select(&rest, 0)?, &labels.index_select(&rest, 0)?)?;
        assert_relative_eq!(
            actual.to_scalar::<f64>()?,
            expected.to_scalar::<f64>()?,
            epsilon = 1e-15
        );
    }
    Ok(())
}

/// Cast to u8, 300 would be 44.
#[test]
fn ignore_index_is_compared_as_i64() -> Result<()> {
    let logits = random(&[1, 60], 2., 1)?;
    let labels = Tensor::new(&[44u8], &CPU)?;
    let loss = LabelSmoothingLoss::new(Smoothing::none());
    let plain = loss.on_device(&logits, &labels)?.to_scalar::<f64>()?;
    let ignoring = loss.with_ignore_index(300).on_device(&logits, &labels)?;
    assert_eq!(ignoring.to_scalar::<f64>()?, plain);

    // −1 does not match the u32 of the same bits.
    let labels = Tensor::new(&[u32::MAX], &CPU)?;
    let loss = LabelSmoothingLoss::new(Smoothing::none());
    let signed = loss.clone().with_ignore_index(-1);
    let no_class = signed.on_device(&logits, &labels).and_then(|loss| Ok(loss.to_scalar::<f64>()?));
    // The CPU returns an error, a GPU NaN.
    assert!(no_class.map_or(true, f64::is_nan));
    let unsigned = loss.with_ignore_index(u32::MAX.into());
    let ignored = unsigned.on_device(&logits, &labels)?.to_scalar::<f64>()?;
    assert!(ignored.is_nan());
    Ok(())
}

#[test]
fn z_loss_adds_the_square_of_logsumexp() -> Result<()> {
    let logits = random(&[4, 3], 2., 1)?;
    let labels = random_labels(&[4], 3, 2)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_reduction(Reduction::None);
    let plain = loss.on_device(&logits, &labels)?;
    let with_z = loss.with_z_loss(0.25)?.on_device(&logits, &labels)?;
    let expected = (plain + (logits.log_sum_exp(1)?.sqr()? * 0.25)?)?;
    assert_close("z-loss", &with_z, &expected, 1e-14)
}

/// An option set later replaces the earlier one. A loss keeps no state between calls with different
/// dtypes.
#[test]
fn later_options_replace_earlier_ones_and_losses_can_be_reused() -> Result<()> {
    let logits = random(&[4, 3], 2., 1)?;
    let labels = random_labels(&[4], 3, 2)?;
    let first = Tensor::new(&[1f32, 2., 3.], &CPU)?;
    let second = Tensor::new(&[3f32, 0., 1.], &CPU)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let weighted = loss.clone().with_class_weights(&first)?;
    let before = weighted.on_device(&logits, &labels)?.to_scalar::<f64>()?;
    let changed = weighted.clone().with_class_weights(&second)?;
    let fresh = loss.with_class_weights(&second)?;
    assert_eq!(
        changed.on_device(&logits, &labels)?.to_scalar::<f64>()?,
        fresh.on_device(&logits, &labels)?.to_scalar::<f64>()?
    );
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F64] {
        let again = weighted.on_device(&logits.to_dtype(dtype)?, &labels)?;
        let again = values(&again)?[0];
        let epsilon = if dtype == DType::F64 { 0. } else { 0.02 };
        assert_abs_diff_eq!(again, before, epsilon = epsilon);
    }
    Ok(())
}

#[test]
fn default_reduction_is_mean() {
    assert_eq!(Reduction::default(), Reduction::Mean);
}

/// The loss, and the logits' gradient of its sum.
fn run(
    loss: &LabelSmoothingLoss,
    row_weights: Option<&Tensor>,
    logits: &Tensor,
    targets: &Tensor,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let logits = Var::from_tensor(logits)?;
    let loss = match row_weights {
        Some(weights) => loss.weighted_on_device(weights, &logits, targets)?,
        None => loss.on_device(&logits, targets)?,
    };
    let gradients = loss.sum_all()?.backward()?;
    Ok((values(&loss)?, values(gradients.get(&logits).expect("no gradient"))?))
}

fn assert_near(name: &str, actual: &[f64], expected: &[f64], epsilon: f64) {
    assert_eq!(actual.len(), expected.len(), "{name}");
    for (actual, expected) in actual.iter().zip(expected) {
        assert!((actual - expected).abs() <= epsilon, "{name}: {actual}, expected {expected}");
    }
}

/// The tolerance for numbers below ten from logits of the dtype.
fn roundings(dtype: DType) -> f64 {
    if dtype == DType::F64 { 1e-13 } else { 4e-6 }
}

// ---- Row weights

/// The third row of weight 1 is the only one that counts.
#[test]
fn rows_of_weight_0_are_not_looked_at() -> Result<()> {
    let rows = [[NAN, 0., 1.], [INF, INF, 0.], [0., 1., 2.], [-INF, -INF, -INF], [3., 1., 0.]];
    let labels = Tensor::new(&[0i64, 3, 1, -100, i64::MAX], &CPU)?;
    let nan = [NAN; 3];
    let probabilities = Tensor::new(&[nan, nan, [0.2, 0.5, 0.3], [INF, 0., 0.], nan], &CPU)?;
    let class_weights = Tensor::new(&[2f32, 1., 0.5], &CPU)?;
    let weights = Tensor::new(&[0f32, 0., 1., -0., 0.], &CPU)?;
    for dtype in dtypes() {
        let logits = Tensor::new(&rows, &CPU)?.to_dtype(dtype)?;
        for targets in [&labels, &probabilities] {
            for smoothing in [Smoothing::over_all(0.1)?, Smoothing::over_unmasked(0.1)?] {
                for reduction in REDUCTIONS {
                    let loss = LabelSmoothingLoss::new(smoothing.clone())
                        .with_class_weights(&class_weights)?
                        .with_z_loss(0.1)?
                        .with_reduction(reduction);
                    let name = format!("{dtype:?} {:?} {reduction:?}", targets.dtype());
                    let actual = run(&loss, Some(&weights), &logits, targets)?;
                    let only = |t: &Tensor| t.narrow(0, 2, 1);
                    let (loss, gradient) = run(&loss, None, &only(&logits)?, &only(targets)?)?;
                    let expected = match reduction {
                        Reduction::None => vec![0., 0., loss[0], 0., 0.],
                        _ => loss,
                    };
                    assert_near(&name, &actual.0, &expected, roundings(dtype));
                    let expected = [&[0.; 6], &gradient[..], &[0.; 6]].concat();
                    assert_near(&name, &actual.1, &expected, roundings(dtype));
                    let mut others = actual.1[..6].iter().chain(&actual.1[9..]);
                    assert!(others.all(|g| *g == 0.), "{name}");
                }
            }
        }
    }
    Ok(())
}

/// The literals are v·loss with the losses log(1 + e) and log(1 + 1/e).
#[test]
fn row_weights_multiply_the_losses_and_gradients() -> Result<()> {
    let logits = Tensor::new(&[[0f64, 1.], [0., 1.], [0., 1.]], &CPU)?;
    let labels = Tensor::new(&[0u32, 1, 1], &CPU)?;
    let weights = Tensor::new(&[2f64, 0.5, 0.], &CPU)?;
    let [far, near] = [1.313_261_687_518_222_8, 0.313_261_687_518_222_86];
    let p = 0.731_058_578_630_004_9;
    let loss = unreduced(Smoothing::none());
    let (losses, gradient) = run(&loss, Some(&weights), &logits, &labels)?;
    assert_near("losses", &losses, &[2. * far, 0.5 * near, 0.], 1e-15);
    let q = 1. - p;
    assert_near("gradient", &gradient, &[-2. * p, 2. * p, 0.5 * q, -0.5 * q, 0., 0.], 1e-15);
    // The z-loss is multiplied too. lse is log(1 + e).
    let losses = run(&loss.with_z_loss(1.)?, Some(&weights), &logits, &labels)?.0;
    let z = far * far;
    assert_near("z-loss", &losses, &[2. * (far + z), 0.5 * (near + z), 0.], 1e-14);

    let mean = LabelSmoothingLoss::new(Smoothing::none());
    let (losses, _) = run(&mean, Some(&weights), &logits, &labels)?;
    assert_near("mean", &losses, &[(2. * far + 0.5 * near) / 2.5], 1e-15);
    let one_hot = Tensor::new(&[[1f64, 0.], [0., 1.], [0., 1.]], &CPU)?;
    let (losses, _) = run(&mean, Some(&weights), &logits, &one_hot)?;
    assert_near("mean of probabilities", &losses, &[(2. * far + 0.5 * near) / 2.5], 1e-15);
    Ok(())
}

/// The mean divides by Σ v·w_y, for probabilities by Σ v. Of many rows, a thread of a GPU adds up several.
#[test]
fn mean_divides_by_row_weights_and_class_weights() -> Result<()> {
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.2)?)
        .with_class_weights(&Tensor::new(&[0.5f64, 4., 3.], &CPU)?)?
        .with_z_loss(0.1)?;
    let ignoring = loss.clone().with_ignore_index(1);
    for copies in [1, 300] {
        let logits = random(&[4, 3], 2., 1)?.repeat((copies, 1))?;
        let labels = Tensor::new(&[0i64, 2, 1, 2], &CPU)?.repeat(copies)?;
        let probabilities = random_probabilities(&[4, 3], 1, 3)?.repeat((copies, 1))?;
        let weights = Tensor::new(&[2u8, 0, 5, 3], &CPU)?.repeat(copies)?;
        for (loss, targets, divisor) in [
            (&loss, &labels, 2. * 0.5 + 5. * 4. + 3. * 3.),
            (&ignoring, &labels, 2. * 0.5 + 3. * 3.),
            (&loss, &probabilities, 10.),
        ] {
            let divisor = divisor * copies as f64;
            let of = |reduction| {
                run(&loss.clone().with_reduction(reduction), Some(&weights), &logits, targets)
            };
            let (sum, mean) = (of(Reduction::Sum)?, of(Reduction::Mean)?);
            assert_relative_eq!(mean.0[0], sum.0[0] / divisor, epsilon = 1e-15);
            for (mean, sum) in mean.1.iter().zip(&sum.1) {
                assert_relative_eq!(*mean, sum / divisor, epsilon = 1e-15);
            }
        }
    }
    Ok(())
}

#[test]
fn row_weights_may_have_any_dtype_and_layout() -> Result<()> {
    let logits = random(&[2, 4, 3], 2., 1)?;
    let labels = random_labels(&[2, 3], 4, 2)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_class_dim(1);
    // The numbers are exact in every dtype.
    let numbers = Tensor::new(&[[1f32, 0., 2.], [3., 4., 0.]], &CPU)?;
    let padded = Tensor::cat(&[&numbers, &(&numbers + 7.)?], 1)?;
    let transposed = numbers.t()?.contiguous()?;
    for reduction in REDUCTIONS {
        let loss = loss.clone().with_reduction(reduction);
        let expected = run(&loss, Some(&numbers), &logits, &labels)?;
        for dtype in [DType::U8, DType::F8E4M3, DType::BF16, DType::F16, DType::F32, DType::F64] {
            for (name, view) in [
                ("contiguous", numbers.to_dtype(dtype)?),
                ("narrowed", padded.to_dtype(dtype)?.narrow(1, 0, 3)?),
                ("transposed", transposed.to_dtype(dtype)?.t()?),
            ] {
                let actual = run(&loss, Some(&view), &logits, &labels)?;
                assert_eq!(actual, expected, "{name} {dtype:?} {reduction:?}");
            }
            let row = numbers.to_dtype(dtype)?.narrow(0, 1, 1)?;
            let broadcast = run(&loss, Some(&row.broadcast_as((2, 3))?), &logits, &labels)?;
            let repeated = Tensor::cat(&[&row, &row], 0)?;
            assert_eq!(broadcast, run(&loss, Some(&repeated), &logits, &labels)?, "{dtype:?}");
        }
    }
    Ok(())
}

#[test]
fn options_after_row_weights_keep_them_and_another_call_replaces_them() -> Result<()> {
    let logits = common::on_device(&random(&[3, 4], 2., 1)?.to_dtype(DType::F32)?)?;
    let labels = common::on_device(&Tensor::new(&[0u32, 3, 1], &CPU)?)?;
    let weights = common::on_device(&Tensor::new(&[1f32, 0., 3.], &CPU)?)?;
    let class_weights = random(&[4], 1., 4)?.abs()?;
    let options = |loss: LabelSmoothingLoss| -> Result<LabelSmoothingLoss> {
        Ok(loss
            .with_reduction(Reduction::Sum)
            .with_class_weights(&class_weights)?
            .with_ignore_index(3)
            .with_class_dim(1)
            .with_z_loss(0.1)?
            .with_logit_scale(0.5)?
            .with_softcap(3.)?)
    };
    let plain = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let loss_of = |loss: &LabelSmoothingLoss| -> Result<f64> {
        Ok(f64::from(loss.forward(&logits, &labels)?.to_scalar::<f32>()?))
    };
    let expected = loss_of(&options(plain.clone())?.weigh_rows(&weights)?)?;
    assert_eq!(loss_of(&options(plain.weigh_rows(&weights)?)?)?, expected);
    let others = common::on_device(&Tensor::new(&[5u8, 6, 0], &CPU)?)?;
    assert_eq!(loss_of(&options(plain.weigh_rows(&others)?)?.weigh_rows(&weights)?)?, expected);
    assert_ne!(loss_of(&options(plain.weigh_rows(&others)?)?)?, expected);
    assert_ne!(loss_of(&options(plain.clone())?)?, expected);
    Ok(())
}

/// The weights are a constant: they get no gradient, and untracked logits stay untracked.
#[test]
fn row_weights_are_constants() -> Result<()> {
    let weights = Var::from_tensor(&random(&[3], 1., 3)?.abs()?)?;
    let logits = random(&[3, 4], 2., 1)?;
    let labels = random_labels(&[3], 4, 2)?;
    let loss = LabelSmoothingLoss::new(Smoothing::none());
    assert!(!loss.weighted_on_device(&weights, &logits, &labels)?.track_op());
    let logits = Var::from_tensor(&logits)?;
    let gradients = loss.weighted_on_device(&weights, &logits, &labels)?.backward()?;
    assert!(gradients.get(&weights).is_none() && gradients.get(&logits).is_some());
    Ok(())
}

// ---- MeanOrZero

#[test]
fn mean_or_zero_has_the_bits_of_the_mean_where_rows_count() -> Result<()> {
    for case in grid(&[5, 7], 1)? {
        if !case.name.contains("Mean,") {
            continue;
        }
        let (mean, gradient) = case.run(DType::F32)?;
        let loss = case.loss.clone().with_reduction(Reduction::MeanOrZero);
        let actual = common::Case { loss, ..case.clone() }.run(DType::F32)?;
        assert_eq!(values(&actual.0)?, values(&mean)?, "{}", case.name);
        assert_eq!(values(&actual.1)?, values(&gradient)?, "{}", case.name);
    }
    Ok(())
}

#[test]
fn mean_or_zero_is_0_with_zero_gradient_where_no_row_counts() -> Result<()> {
    let all_zero = Tensor::new(&[0f32, 0., 0.], &CPU)?;
    let zero_weight = Tensor::new(&[1f32, 0., 2.], &CPU)?;
    let labels = Tensor::new(&[1u32, 1, 1], &CPU)?;
    let probabilities = random_probabilities(&[3, 3], 1, 3)?;
    let plain = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?)
        .with_z_loss(0.1)?
        .with_reduction(Reduction::MeanOrZero);
    let ignoring = plain.clone().with_ignore_index(1);
    let weighted = plain.clone().with_class_weights(&zero_weight)?;
    for dtype in dtypes() {
        let logits = random(&[3, 3], 2., 1)?.to_dtype(dtype)?;
        let nan = Tensor::full(NAN, (3, 3), &CPU)?.to_dtype(dtype)?;
        let none = logits.narrow(0, 0, 0)?;
        let no_labels = labels.narrow(0, 0, 0)?;
        for (name, loss, row_weights, logits, targets) in [
            ("no rows", &plain, None, &none, &no_labels),
            ("no rows, class weights", &weighted, None, &none, &no_labels),
            ("no rows, probabilities", &plain, None, &none, &probabilities.narrow(0, 0, 0)?),
            ("ignored", &ignoring, None, &logits, &labels),
            ("ignored NaN", &ignoring, None, &nan, &labels),
            ("row weights", &plain, Some(&all_zero), &logits, &labels),
            ("row weights, NaN", &plain, Some(&all_zero), &nan, &labels),
            ("row weights, probabilities", &plain, Some(&all_zero), &nan, &probabilities),
            ("class weights", &weighted, None, &logits, &labels),
            ("class weights, NaN", &weighted, None, &nan, &labels),
        ] {
            let (loss, gradient) = run(loss, row_weights, logits, targets)?;
            assert_eq!(loss, [0.], "{name} {dtype:?}");
            assert!(gradient.iter().all(|g| *g == 0.), "{name} {dtype:?}: {gradient:?}");
        }
    }
    Ok(())
}

#[test]
fn mean_or_zero_keeps_nan_and_infinite_losses() -> Result<()> {
    let labels = Tensor::new(&[0u32, 1], &CPU)?;
    let loss = LabelSmoothingLoss::new(Smoothing::none()).with_reduction(Reduction::MeanOrZero);
    for (bad, expected) in [(NAN, NAN), (-INF, INF)] {
        let logits = Tensor::new(&[[bad, 0.], [0., 1.]], &CPU)?;
        let actual = loss.on_device(&logits, &labels)?.to_scalar::<f64>()?;
        assert!(actual == expected || actual.is_nan() && expected.is_nan(), "{actual}");
    }
    Ok(())
}

// ---- Scale and softcap

/// The options are applied by hand, with candle's operations.
#[test]
fn scale_and_softcap_match_scaled_and_capped_logits() -> Result<()> {
    let targets = [random_labels(&[6], 9, 2)?, random_probabilities(&[6, 9], 1, 3)?];
    let class_weights = random(&[9], 1., 4)?.abs()?;
    for (dtype, loss_epsilon, epsilon) in
        [(DType::F64, 1e-13, 1e-13), (DType::F32, 1e-5, 1e-6), (DType::BF16, 1e-5, 5e-3)]
    {
        for (name, smoothing) in smoothings(9)? {
            for (scale, cap) in [(0.3, None), (2., None), (1., Some(2.5)), (1.7, Some(4.))] {
                let loss = LabelSmoothingLoss::new(smoothing.clone())
                    .with_class_weights(&class_weights)?
                    .with_z_loss(0.01)?;
                let mut mapping = loss.clone().with_logit_scale(scale)?;
                if let Some(cap) = cap {
                    mapping = mapping.with_softcap(cap)?;
                }
                for targets in &targets {
                    let logits = random(&[6, 9], 6., 1)?.to_dtype(dtype)?;
                    let actual = run(&mapping, None, &logits, targets)?;
                    let logits = Var::from_tensor(&logits.to_dtype(DType::F64)?)?;
                    let scaled = (logits.as_tensor() * scale)?;
                    let mapped = match cap {
                        Some(cap) => ((scaled / cap)?.tanh()? * cap)?,
                        None => scaled,
                    };
                    let expected = loss.on_device(&mapped, targets)?;
                    let gradients = expected.backward()?;
                    let gradient = values(gradients.get(&logits).expect("no gradient"))?;
                    let name = format!("{name} {dtype:?}, scale {scale}, cap {cap:?}");
                    assert_near(&name, &actual.0, &values(&expected)?, loss_epsilon);
                    assert_near(&name, &actual.1, &gradient, epsilon);
                }
            }
        }
    }
    Ok(())
}

/// The distance between neighbouring numbers of the arithmetic around `value`.
fn ulp(dtype: DType, value: f64) -> f64 {
    let digits = if dtype == DType::F64 { 52 } else { 23 };
    2f64.powi(value.abs().log2().floor() as i32 - digits)
}

/// The lse of a single class is its logit.
#[test]
fn capped_logits_are_right_to_some_ulps() -> Result<()> {
    // From 1e-9 to 1e9, of both signs.
    let numbers: Vec<f64> = (0..720)
        .map(|i| 10f64.powf(f64::from(i / 2) / 20. - 9.) * if i % 2 == 0 { 1. } else { -1. })
        .collect();
    let labels = Tensor::zeros(numbers.len(), DType::U32, &CPU)?;
    for dtype in dtypes() {
        let range = if dtype == DType::F16 { 1e-4..6e4 } else { 0. ..INF };
        let kept = |x: &f64| if range.contains(&x.abs()) { *x } else { 1. };
        let given: Vec<f64> = numbers.iter().map(kept).collect();
        let logits = Tensor::from_vec(given, (numbers.len(), 1), &CPU)?.to_dtype(dtype)?;
        // The expected numbers have roundings of their own in f64.
        let ulps = if dtype == DType::F64 { 7. } else { 4. };
        for cap in [1e-3, 0.05, 1., 7.3, 30., 1e4, 1e8, 1e12] {
            for scale in [1., 0.37, 250.] {
                let loss = LabelSmoothingLoss::new(Smoothing::none())
                    .with_softcap(cap)?
                    .with_logit_scale(scale)?;
                let lse = values(&loss.metrics_on_device(None, &logits, &labels)?.1.lse)?;
                for (actual, x) in lse.iter().zip(values(&logits)?) {
                    let expected = cap * (scale * x / cap).tanh();
                    let error = (actual - expected).abs() / ulp(dtype, expected);
                    assert!(
                        error <= ulps,
                        "{dtype:?}, cap {cap}, scale {scale}, {x}: {actual}, expected {expected}"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn softcap_keeps_masks_and_makes_infinity_the_cap() -> Result<()> {
    let label = Tensor::new(&[0u32], &CPU)?;
    for dtype in dtypes() {
        let loss = unreduced(Smoothing::over_unmasked(0.)?).with_softcap(5.)?;
        let logits = Tensor::new(&[[INF, 0., -INF]], &CPU)?.to_dtype(dtype)?;
        let (losses, gradient) = run(&loss, None, &logits, &label)?;
        assert_near("capped", &losses, &[(-5f64).exp().ln_1p()], roundings(dtype));
        // The derivative of tanh is 0 at infinity.
        assert_eq!((gradient[0], gradient[2]), (0., 0.), "{dtype:?}");
        let p = 1. / (1. + 5f64.exp());
        assert_near(
            "gradient",
            &gradient[1..2],
            &[p],
            if dtype == DType::BF16 { 3e-5 } else { 1e-5 },
        );

        // A row of masked classes is NaN, as without a softcap.
        let logits = Tensor::full(-INF, (1, 3), &CPU)?.to_dtype(dtype)?;
        assert!(run(&loss, None, &logits, &label)?.0[0].is_nan());
        // A NaN is not capped.
        let logits = Tensor::new(&[[NAN, 0., 1.]], &CPU)?.to_dtype(dtype)?;
        let (losses, gradient) = run(&loss, None, &logits, &label)?;
        assert!(losses[0].is_nan() && gradient.iter().all(|g| g.is_nan()));
    }
    Ok(())
}

/// A large cap leaves the logits as they are.
#[test]
fn huge_caps_change_nothing() -> Result<()> {
    let logits = random(&[4, 5], 3., 1)?;
    let labels = random_labels(&[4], 5, 2)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    for dtype in dtypes() {
        let logits = logits.to_dtype(dtype)?;
        let expected = run(&loss, None, &logits, &labels)?;
        for cap in [1e12, 1e30, f64::MAX] {
            let actual = run(&loss.clone().with_softcap(cap)?, None, &logits, &labels)?;
            assert_near(&format!("{dtype:?} {cap}"), &actual.0, &expected.0, roundings(dtype));
            let ulp = if dtype == DType::BF16 { 2e-3 } else { 2e-4 };
            let epsilon = if dtype == DType::F64 { 1e-13 } else { ulp };
            assert_near(&format!("{dtype:?} {cap}"), &actual.1, &expected.1, epsilon);
        }
    }
    Ok(())
}

/// The quotient of a logit and a huge cap has few digits. The logit keeps its own. With one class, the loss is its square.
#[test]
fn tiny_logits_keep_their_digits_below_huge_caps() -> Result<()> {
    let label = Tensor::new(&[0u32], &CPU)?;
    let loss = unreduced(Smoothing::none()).with_z_loss(1.)?.with_softcap(f64::MAX)?;
    for dtype in dtypes() {
        let epsilon = if dtype == DType::F64 { 1e-14 } else { 1e-6 };
        for given in [1e-3, -2e-6] {
            let logits = Tensor::new(&[[given]], &CPU)?.to_dtype(dtype)?;
            let x = values(&logits)?[0];
            let loss = run(&loss, None, &logits, &label)?.0[0];
            assert!((loss / (x * x) - 1.).abs() < epsilon, "{dtype:?} {x}: {loss}");
        }
    }
    Ok(())
}

// ---- Smoothing over the classes that are not masked

/// Every row has other masked classes. Its loss and gradient are those of the other classes alone.
#[test]
fn over_unmasked_is_over_all_of_the_unmasked_classes() -> Result<()> {
    for (num_rows, num_classes) in [(5, 7), (3, 40), (2, 700), (2, 17_000)] {
        let inputs = common::MaskedInputs::new(&[num_rows, num_classes], 1)?;
        let class_weights = random(&[num_classes], 1., 4)?.abs()?;
        assert!(values(&inputs.masked_logits)?.contains(&-INF));
        for dtype in [DType::F64, DType::F32] {
            let epsilon = roundings(dtype) * if num_classes > 100 { 10. } else { 1. };
            let masked = inputs.masked_logits.to_dtype(dtype)?;
            let labels = inputs.labels.to_vec1::<i64>()?;
            for (row, label) in labels.into_iter().enumerate() {
                let all = masked.narrow(0, row, 1)?;
                let kept: Vec<u32> = (0u32..)
                    .zip(values(&all)?)
                    .filter(|(_, x)| *x > -INF)
                    .map(|(class, _)| class)
                    .collect();
                let new_label = kept.iter().position(|class| i64::from(*class) == label);
                let new_label = Tensor::new(&[new_label.expect("the label is kept") as u32], &CPU)?;
                let kept = Tensor::new(kept, &CPU)?;
                for weighted in [false, true] {
                    let with_weights = |smoothing, weights: &Tensor| -> Result<_> {
                        let loss = unreduced(smoothing).with_z_loss(0.01)?;
                        Ok(if weighted { loss.with_class_weights(weights)? } else { loss })
                    };
                    let loss = with_weights(Smoothing::over_unmasked(0.3)?, &class_weights)?;
                    let (actual, gradient) = run(&loss, None, &all, &Tensor::new(&[label], &CPU)?)?;
                    let of_kept = class_weights.index_select(&kept, 0)?;
                    let loss = with_weights(Smoothing::over_all(0.3)?, &of_kept)?;
                    let few = all.index_select(&kept, 1)?;
                    let expected = run(&loss, None, &few, &new_label)?;
                    let name = format!("{num_classes} {dtype:?}, weights {weighted}");
                    assert_near(&name, &actual, &expected.0, epsilon);
                    let of_masked = values(&all)?.into_iter().zip(&gradient);
                    for (x, g) in of_masked {
                        assert!(x > -INF || *g == 0., "{name}: {g}");
                    }
                    let gradient = Tensor::new(gradient, &CPU)?.index_select(&kept, 0)?;
                    assert_near(&name, &values(&gradient)?, &expected.1, epsilon);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn over_unmasked_without_masked_classes_is_over_all() -> Result<()> {
    let logits = random(&[6, 300], 3., 1)?;
    let targets = [random_labels(&[6], 300, 2)?, random_probabilities(&[6, 300], 1, 3)?];
    for dtype in dtypes() {
        let logits = logits.to_dtype(dtype)?;
        for targets in &targets {
            for epsilon in [0., 0.2, 1.] {
                let of = |smoothing| -> Result<_> {
                    run(
                        &LabelSmoothingLoss::new(smoothing).with_z_loss(0.01)?,
                        None,
                        &logits,
                        targets,
                    )
                };
                let actual = of(Smoothing::over_unmasked(epsilon)?)?;
                let expected = of(Smoothing::over_all(epsilon)?)?;
                assert_near("loss", &actual.0, &expected.0, 2. * roundings(dtype));
                let ulp = if dtype == DType::BF16 { 1e-3 } else { 2e-4 };
                let tolerance = if dtype == DType::F64 { 1e-13 } else { ulp };
                assert_near("gradient", &actual.1, &expected.1, tolerance);
            }
        }
    }
    Ok(())
}

/// The distance of the class of weight 0 from the largest logit is infinite in f32.
#[test]
fn over_unmasked_of_logits_at_both_ends_of_f32() -> Result<()> {
    let logits = Tensor::new(&[[3e38f32, -3e38, 0.]], &CPU)?;
    let class_weights = Tensor::new(&[1f32, 0., 1.], &CPU)?;
    let loss = unreduced(Smoothing::over_unmasked(0.1)?).with_class_weights(&class_weights)?;
    for (dim, logits) in [(1, logits.clone()), (0, logits.t()?.contiguous()?)] {
        let loss = loss.clone().with_class_dim(dim);
        let (loss, _) = run(&loss, None, &logits, &Tensor::new(&[0u32], &CPU)?)?;
        assert!((loss[0] / 1e37 - 1.).abs() < 1e-6, "{loss:?}");
    }
    Ok(())
}

/// The classes 0 and 3 are masked. The others have the losses log(1 + e) and log(1 + 1/e).
#[test]
fn a_masked_label_has_an_infinite_loss_unless_epsilon_is_1() -> Result<()> {
    let [far, near] = [1.313_261_687_518_222_8, 0.313_261_687_518_222_86];
    let p = 0.731_058_578_630_004_9;
    let probability = Tensor::new(&[[1f64, 0., 0., 0.]], &CPU)?;
    let label = |class: u32| Tensor::new(&[class], &CPU);
    for dtype in dtypes() {
        let epsilon = roundings(dtype);
        let half = if dtype == DType::F64 { 1e-14 } else { 2e-3 };
        let logits = Tensor::new(&[[-INF, 1., 2., -INF]], &CPU)?.to_dtype(dtype)?;
        let smoothing = Smoothing::over_unmasked;
        for targets in [label(0)?, probability.clone()] {
            let (loss, gradient) = run(&unreduced(smoothing(0.5)?), None, &logits, &targets)?;
            assert_eq!(loss, [INF], "{dtype:?}");
            let expected = [-0.5, 1. - p - 0.25, p - 0.25, 0.];
            assert_near("infinite", &gradient, &expected, half);
            let (loss, gradient) = run(&unreduced(smoothing(1.)?), None, &logits, &targets)?;
            assert_near("epsilon 1", &loss, &[(far + near) / 2.], epsilon);
            assert_near("epsilon 1", &gradient, &[0., 0.5 - p, p - 0.5, 0.], half);
        }
        // A class weight of 0 makes the label's target 0.
        let weights = Tensor::new(&[0f32, 1., 1., 1.], &CPU)?;
        let weighted = unreduced(smoothing(0.5)?).with_class_weights(&weights)?;
        let (loss, _) = run(&weighted, None, &logits, &label(0)?)?;
        assert_near("weight 0", &loss, &[(far + near) / 4.], epsilon);

        let (loss, _) = run(&unreduced(smoothing(0.5)?), None, &logits, &label(2)?)?;
        assert_near("label", &loss, &[0.75 * near + 0.25 * far], epsilon);
        let over_all = unreduced(Smoothing::over_all(0.5)?);
        assert_eq!(run(&over_all, None, &logits, &label(2)?)?.0, [INF]);
        // A row without any other class is NaN, as is one with a NaN logit.
        for row in [[-INF; 4], [NAN, 0., -INF, 1.]] {
            let logits = Tensor::new(&[row], &CPU)?.to_dtype(dtype)?;
            let (loss, gradient) = run(&unreduced(smoothing(0.5)?), None, &logits, &label(1)?)?;
            assert!(loss[0].is_nan() && gradient.iter().all(|g| g.is_nan()), "{row:?}");
        }
    }
    Ok(())
}

/// What counts is the logit as given. Scaled, it is below the numbers of f32, but its class has a share of ε.
#[test]
fn over_unmasked_looks_at_the_logits_before_the_scale() -> Result<()> {
    let logits = Tensor::new(&[[-1e38f32, 0., -f32::INFINITY]], &CPU)?;
    let label = Tensor::new(&[1u32], &CPU)?;
    let loss = unreduced(Smoothing::over_unmasked(0.5)?).with_logit_scale(1e3)?;
    assert!(run(&loss, None, &logits, &label)?.0[0] > 1e37);
    // The cap makes it −2, whose target is a quarter.
    let loss = unreduced(Smoothing::over_unmasked(0.5)?).with_softcap(2.)?;
    let log_sum = (-2f64).exp().ln_1p();
    let losses = run(&loss, None, &logits, &label)?.0;
    assert_near("capped", &losses, &[log_sum + 0.25 * 2.], 1e-6);
    Ok(())
}
