//! The gradient is the derivative of the loss, and backward delivers it to the variables.

mod common;

use approx::assert_abs_diff_eq;
use candle_core::{DType, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing};
use candle_nn::{Linear, Module};
use common::{
    CPU, Case, OnDevice, fewer_where_slow, grid, random, random_labels, sum_with_grad_output,
    values,
};

/// Central differences in f64.
///
/// With a step of h = 1e-4 the error of the difference is h²/6 times the third derivative, which is
/// at most a few units, plus the rounding error of the loss divided by h. Both together are below
/// 1e-7.
#[test]
fn gradient_matches_central_differences_for_every_combination_of_options() -> Result<()> {
    let step = 1e-4;
    for case in fewer_where_slow([grid(&[3, 4], 1)?, grid(&[2, 3, 2], 1)?].concat()) {
        let (_, gradient) = case.run(DType::F64)?;
        let gradient = values(&gradient)?;
        let logits = values(&case.logits)?;
        for i in 0..logits.len() {
            let loss_at = |by: f64| -> Result<f64> {
                let mut shifted = logits.clone();
                shifted[i] += by;
                let logits = Tensor::from_vec(shifted, case.logits.dims(), &CPU)?;
                sum_with_grad_output(&case.forward(&logits)?)?.to_scalar::<f64>()
            };
            let difference = (loss_at(step)? - loss_at(-step)?) / (2. * step);
            // A mean over no rows is NaN.
            assert!(
                (gradient[i] - difference).abs() < 1e-7 || difference.is_nan() && gradient[i] == 0.,
                "{}, logit {i}: gradient {}, difference {difference}",
                case.name,
                gradient[i]
            );
        }
    }
    Ok(())
}

#[test]
fn gradient_reaches_the_parameters_of_a_linear_layer() -> Result<()> {
    let weight = Var::from_tensor(&random(&[5, 4], 1., 1)?)?;
    let bias = Var::from_tensor(&random(&[5], 1., 2)?)?;
    let layer = Linear::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone()));
    let labels = random_labels(&[6], 5, 3)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_others(0.1)?);

    let logits = layer.forward(&random(&[6, 4], 1., 4)?)?;
    let gradients = loss.on_device(&logits, &labels)?.backward()?;
    let expected =
        candle_label_smoothing::reference::forward(&loss, &logits, &labels)?.backward()?;
    for var in [&weight, &bias] {
        let gradient = gradients.get(var).expect("no gradient arrived");
        assert_eq!(gradient.dims(), var.dims());
        let expected = expected.get(var).expect("no gradient of the reference");
        for (actual, expected) in values(gradient)?.iter().zip(values(expected)?) {
            assert_abs_diff_eq!(*actual, expected, epsilon = 1e-14);
            assert!(actual.abs() > 1e-6);
        }
    }
    Ok(())
}

/// An untracked loss keeps nothing for backward.
#[test]
fn loss_is_tracked_only_if_the_logits_are() -> Result<()> {
    let loss = LabelSmoothingLoss::new(Smoothing::none());
    let labels = random_labels(&[6], 5, 3)?;
    let logits = random(&[6, 5], 1., 1)?;
    assert!(!loss.on_device(&logits, &labels)?.track_op());
    let variable = Var::from_tensor(&logits)?;
    assert!(loss.on_device(&variable, &labels)?.track_op());
    assert!(!loss.on_device(&variable.detach(), &labels)?.track_op());
    // Targets are constants and get no gradient, even if they come from a trained network.
    let teacher = Var::from_tensor(&logits)?;
    let probabilities = candle_nn::ops::softmax(&teacher, 1)?;
    let gradients = loss.on_device(&variable, &probabilities)?.backward()?;
    assert!(gradients.get(&variable).is_some());
    assert!(gradients.get(&teacher).is_none());
    assert!(!loss.on_device(&logits, &probabilities)?.track_op());
    Ok(())
}

#[test]
fn gradient_is_proportional_to_grad_output() -> Result<()> {
    for case in grid(&[3, 4], 1)? {
        let logits = Var::from_tensor(&case.logits)?;
        let loss = case.forward(&logits)?;
        let gradient = |grad_output: f64| -> Result<Vec<f64>> {
            // A tensor, because candle drops the graph in a multiplication by the number 0.
            let grad_output = Tensor::full(grad_output, loss.shape(), &CPU)?;
            let gradients = (&loss * grad_output)?.backward()?;
            values(gradients.get(&logits).expect("no gradient"))
        };
        let once = gradient(1.)?;
        for (scaled, once) in gradient(-4.)?.iter().zip(&once) {
            // Scaling by a power of two is exact.
            assert_eq!(*scaled, -4. * once, "{}", case.name);
        }
        assert!(gradient(0.)?.iter().all(|g| *g == 0.), "{}", case.name);
    }
    Ok(())
}

#[test]
fn second_backward_gives_the_same_gradient() -> Result<()> {
    for case in grid(&[3, 4], 1)? {
        let logits = Var::from_tensor(&case.logits)?;
        let loss = sum_with_grad_output(&case.forward(&logits)?)?;
        let first = values(loss.backward()?.get(&logits).expect("no gradient"))?;
        let second = values(loss.backward()?.get(&logits).expect("no gradient"))?;
        assert_eq!(first, second, "{}", case.name);
    }
    Ok(())
}

/// Logits that are used by two losses get the sum of both gradients.
#[test]
fn gradients_of_two_losses_add_up() -> Result<()> {
    let [first, second] = [Reduction::Sum, Reduction::Mean]
        .map(|reduction| LabelSmoothingLoss::new(Smoothing::none()).with_reduction(reduction));
    let labels = random_labels(&[3], 4, 3)?;
    let logits = Var::from_tensor(&random(&[3, 4], 1., 1)?)?;
    let gradient = |loss: Tensor| -> Result<Vec<f64>> {
        values(loss.backward()?.get(&logits).expect("no gradient"))
    };
    let (a, b) = (first.on_device(&logits, &labels)?, second.on_device(&logits, &labels)?);
    let both = gradient((&a + &b)?)?;
    for ((both, a), b) in both.iter().zip(gradient(a)?).zip(gradient(b)?) {
        assert_abs_diff_eq!(*both, a + b, epsilon = 1e-15);
    }
    Ok(())
}

/// Gradient descent on the logits converges to the smoothed targets, where the loss is the entropy
/// of the targets.
#[test]
fn gradient_descent_converges_to_the_smoothed_targets() -> Result<()> {
    let case = Case {
        name: "descent".to_string(),
        loss: LabelSmoothingLoss::new(Smoothing::over_others(0.1)?),
        row_weights: None,
        logits: random(&[1, 3], 1., 1)?,
        targets: Tensor::new(&[1u32], &CPU)?,
    };
    let logits = Var::from_tensor(&case.logits)?;
    for _ in 0..2000 {
        let gradients = case.forward(&logits)?.backward()?;
        let gradient = gradients.get(&logits).expect("no gradient");
        logits.set(&(logits.as_tensor() - gradient)?)?;
    }
    let softmax = values(&candle_nn::ops::softmax(&logits, 1)?)?;
    for (actual, target) in softmax.iter().zip([0.05, 0.9, 0.05]) {
        assert_abs_diff_eq!(*actual, target, epsilon = 1e-9);
    }
    let entropy = -(0.9f64 * 0.9f64.ln() + 2. * 0.05 * 0.05f64.ln());
    let loss = case.forward(&logits)?;
    assert_abs_diff_eq!(loss.to_scalar::<f64>()?, entropy, epsilon = 1e-12);
    Ok(())
}
