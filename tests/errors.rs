//! Invalid input: each error message contains the given value and the expected one.

mod common;

use candle_core::{D, DType, DeviceLocation, Result, Shape, Storage, Tensor, Var};
use candle_label_smoothing::{
    Error, LabelSmoothingLoss, Metrics, Reduction, Smoothing, check_targets, smooth_targets,
    testing,
};
use common::{CPU, random, random_labels, values};

/// Checks the message, and that the error is unchanged after conversion to candle's error and back.
#[track_caller]
fn assert_error<T>(result: candle_label_smoothing::Result<T>, parts: &[&str]) {
    let Err(error) = result else {
        panic!("no error, but expected one that says {parts:?}");
    };
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
    let kind = std::mem::discriminant(&error);
    let converted = candle_core::Error::from(error);
    assert!(converted.to_string().contains(&message), "{converted}");
    let back = Error::from(converted);
    assert_eq!(std::mem::discriminant(&back), kind);
    assert_eq!(back.to_string(), message);
}

fn loss() -> LabelSmoothingLoss {
    LabelSmoothingLoss::new(Smoothing::none())
}

fn zeros(dims: &[usize], dtype: DType) -> Result<Tensor> {
    Tensor::zeros(dims, dtype, &CPU)
}

#[test]
fn epsilon_outside_0_to_1() -> Result<()> {
    let prior = Tensor::new(&[0.5f32, 0.5], &CPU)?;
    for (epsilon, given) in
        [(-0.1, "-0.1"), (1.1, "1.1"), (10., "10"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")]
    {
        for smoothing in [
            Smoothing::over_all(epsilon),
            Smoothing::over_others(epsilon),
            Smoothing::toward(epsilon, &prior),
            Smoothing::over_unmasked(epsilon),
        ] {
            assert_error(smoothing, &["epsilon", given, "0 to 1"]);
        }
    }
    for epsilon in [0., 1., -0.] {
        assert!(Smoothing::over_all(epsilon).is_ok());
        assert!(Smoothing::over_others(epsilon).is_ok());
        assert!(Smoothing::over_unmasked(epsilon).is_ok());
    }
    Ok(())
}

#[test]
fn invalid_z_loss() {
    for (coefficient, given) in [(-1., "-1"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
        assert_error(loss().with_z_loss(coefficient), &["z-loss", given, ">= 0"]);
    }
}

#[test]
fn logit_scale_and_softcap_not_positive_or_not_finite() {
    for (value, given) in [
        (0., "is 0,"),
        (-0., "is -0,"),
        (-2.5, "-2.5"),
        (f64::NAN, "NaN"),
        (f64::INFINITY, "inf"),
        (f64::NEG_INFINITY, "-inf"),
    ] {
        let expected = |what| [what, given, "finite number greater than 0"];
        assert_error(loss().with_logit_scale(value), &expected("logit scale"));
        assert_error(loss().with_softcap(value), &expected("softcap"));
    }
    for value in [f64::MIN_POSITIVE, 30., f64::MAX] {
        assert!(loss().with_logit_scale(value).is_ok());
        assert!(loss().with_softcap(value).is_ok());
    }
}

#[test]
fn invalid_class_weights() -> Result<()> {
    let given = |weights: &Tensor| loss().with_class_weights(weights);
    assert_error(
        given(&zeros(&[2, 3], DType::F32)?),
        &["class weights", "[2, 3]", "[num_classes]"],
    );
    assert_error(given(&zeros(&[], DType::F32)?), &["class weights", "[]"]);
    assert_error(given(&zeros(&[3], DType::U32)?), &["class weights", "U32", "floating-point"]);
    let bad = |value: f32| Tensor::new(&[1., value, 1.], &CPU);
    assert_error(given(&bad(-1.)?), &["class weights", "-1", "class 1"]);
    assert_error(given(&bad(f32::NAN)?), &["class weights", "NaN"]);
    assert_error(given(&bad(f32::INFINITY)?), &["class weights", "inf"]);

    let loss = given(&bad(1.)?)?;
    let targets = zeros(&[2], DType::U32)?;
    let result = loss.forward(&zeros(&[2, 4], DType::F32)?, &targets);
    assert_error(result, &["3 class weights", "4 classes"]);
    Ok(())
}

#[test]
fn invalid_priors() -> Result<()> {
    let toward = |prior: &Tensor| Smoothing::toward(0.1, prior);
    let prior = |values: [f32; 3]| Tensor::new(&values, &CPU);
    assert_error(toward(&zeros(&[1, 3], DType::F32)?), &["prior", "[1, 3]"]);
    assert_error(toward(&zeros(&[3], DType::I64)?), &["prior", "I64"]);
    assert_error(toward(&prior([0.5, -0.5, 1.])?), &["prior", "-0.5", "class 1"]);
    assert_error(toward(&prior([0.5, 0.5, f32::NAN])?), &["prior", "NaN"]);
    assert_error(toward(&prior([2., 3., 5.])?), &["prior", "sum to 10"]);
    assert_error(toward(&zeros(&[0], DType::F32)?), &["prior", "sum to 0"]);
    let halves = toward(&Tensor::new(&[0.5f32, 0.5], &CPU)?)?;
    let labels = zeros(&[2], DType::U32)?;
    let result = LabelSmoothingLoss::new(halves.clone()).forward(&random(&[2, 3], 1., 1)?, &labels);
    assert_error(result, &["2 prior probabilities", "3 classes"]);
    assert_error(smooth_targets(&labels, 3, &halves), &["2 prior", "3 classes"]);
    Ok(())
}

#[test]
fn mismatched_shapes() -> Result<()> {
    let forward = |loss: LabelSmoothingLoss, logits: &[usize], targets: &[usize], dtype| {
        loss.forward(&zeros(logits, DType::F32)?, &zeros(targets, dtype)?)
    };
    let labels = DType::U32;
    assert_error(forward(loss(), &[], &[], labels), &["scalar"]);
    assert_error(forward(loss(), &[3, 0], &[3], labels), &["no classes", "[3, 0]"]);
    assert_error(
        forward(loss().with_class_dim(2), &[3, 4], &[3], labels),
        &["class dimension is 2", "[3, 4]", "0 to 1"],
    );
    assert!(forward(loss().with_class_dim(0), &[4], &[], labels).is_ok());
    assert_error(
        forward(loss().with_class_dim(1), &[4], &[], labels),
        &["class dimension is 1", "[4]"],
    );
    // Labels of another length, flattened, one-hot, or for another class dimension.
    assert_error(forward(loss(), &[3, 4], &[2], labels), &["[2]", "[3]", "[3, 4]"]);
    assert_error(
        forward(loss(), &[2, 3, 4], &[6], labels),
        &["[6]", "[2, 3]", "[2, 3, 4]", "reshape"],
    );
    assert_error(forward(loss(), &[3, 4], &[3, 1], labels), &["[3, 1]", "[3]", "reshape"]);
    assert_error(forward(loss(), &[4], &[1], labels), &["[1]", "[]", "reshape"]);
    assert_error(
        forward(loss(), &[3, 4], &[3, 4], labels),
        &["[3, 4]", "[3]", "one-hot", "argmax(1)"],
    );
    assert_error(
        forward(loss(), &[2, 5, 3, 4], &[2, 3, 4], labels),
        &["[2, 3, 4]", "[2, 5, 3]", "class dimension 3", "with_class_dim(1)"],
    );
    // The number of elements matches, but reshaping would mix up the dimensions.
    assert_error(
        forward(loss(), &[2, 4, 3, 4], &[2, 3, 4], labels),
        &["[2, 3, 4]", "[2, 4, 3]", "with_class_dim(1)"],
    );
    assert_error(
        forward(loss().with_class_dim(1), &[2, 3, 4, 5], &[2, 3, 4], labels),
        &["[2, 4, 5]", "class dimension 1", "with_class_dim(3)"],
    );
    let lengths = forward(loss(), &[3, 4], &[2], labels).expect_err("no error").to_string();
    assert!(lengths.ends_with("without their class dimension 1"), "no hint fits: {lengths}");
    // Floating-point targets are probabilities.
    assert_error(
        forward(loss(), &[3, 4], &[3], DType::F32),
        &["F32", "probabilities", "[3]", "[3, 4]", "integer dtype"],
    );
    assert_error(
        forward(loss().with_ignore_index(-100), &[3, 4], &[3], DType::F32),
        &["F32", "probabilities", "[3]", "[3, 4]", "to_dtype(DType::I64)"],
    );
    assert_error(forward(loss(), &[3, 4], &[4, 3], DType::F32), &["[4, 3]", "[3, 4]"]);
    // An empty batch has as many elements as its logits.
    assert_error(forward(loss(), &[0, 3], &[0, 3], labels), &["[0, 3]", "[0]", "one-hot"]);
    Ok(())
}

/// The advice for integer targets of the logits' shape is not to make them floats: several labels a row would then train a
/// softmax loss.
#[test]
fn one_hot_and_multi_hot_integers() -> Result<()> {
    let logits = random(&[2, 3, 4, 5], 2., 1)?;
    let labels = random_labels(&[2, 4, 5], 3, 2)?;
    let loss = loss().with_class_dim(1);
    let expected = loss.forward(&logits, &labels)?.to_scalar::<f64>()?;
    for dtype in [DType::U8, DType::U32, DType::I16, DType::I32, DType::I64] {
        let one_hot = smooth_targets(&labels, 3, &Smoothing::none())?.permute([0, 3, 1, 2])?;
        let one_hot = one_hot.to_dtype(dtype)?;
        let result = loss.forward(&logits, &one_hot);
        assert_error(
            result,
            &[
                &format!("{dtype:?}"),
                "[2, 3, 4, 5]",
                "[2, 4, 5]",
                "one class a row",
                "one-hot",
                "argmax(1)",
                "several labels",
                "binary cross-entropy for each class",
                "Tensor::stack(&[&logits.zeros_like()?, &logits], D::Minus1)",
            ],
        );
        let message = loss.forward(&logits, &one_hot).expect_err("no error").to_string();
        assert!(!message.contains("to_dtype") && !message.contains("F32"), "{message}");
        // The advice works.
        let of_argmax = loss.forward(&logits, &one_hot.argmax(1)?)?.to_scalar::<f64>()?;
        assert_eq!(of_argmax, expected, "{dtype:?}");
        let pairs = Tensor::stack(&[&logits.zeros_like()?, &logits], D::Minus1)?;
        let binary = LabelSmoothingLoss::new(Smoothing::none()).with_reduction(Reduction::None);
        let terms = values(&binary.forward(&pairs, &one_hot)?)?;
        let labels = values(&one_hot)?;
        for ((term, x), label) in terms.iter().zip(values(&logits)?).zip(labels) {
            let probability = 1. / (1. + (-x).exp());
            let expected = if label == 1. { -probability.ln() } else { -(1. - probability).ln() };
            assert!((term - expected).abs() < 1e-12, "{term}, expected {expected}");
        }
    }
    Ok(())
}

#[test]
fn probabilities_in_another_order_of_dimensions() -> Result<()> {
    let loss = loss().with_class_dim(1);
    let logits = random(&[2, 3, 4, 5], 2., 1)?;
    let labels = random_labels(&[2, 4, 5], 3, 2)?;
    let one_hot = smooth_targets(&labels, 3, &Smoothing::none())?;
    assert_eq!(one_hot.dims(), [2, 4, 5, 3]);
    let result = loss.forward(&logits, &one_hot);
    assert_error(result, &["F32", "[2, 3, 4, 5]", "[2, 4, 5, 3]", "permute([0, 3, 1, 2])"]);
    let message = loss.forward(&logits, &one_hot).expect_err("no error").to_string();
    assert!(!message.contains("integer"), "{message}");
    let permuted = loss.forward(&logits, &one_hot.permute([0, 3, 1, 2])?)?;
    let expected = loss.forward(&logits, &labels)?;
    assert!((permuted - expected)?.to_scalar::<f64>()?.abs() < 1e-12);

    // Two dimensions of the same length.
    let square = zeros(&[2, 3, 4, 4], DType::F32)?;
    let result = loss.forward(&square, &zeros(&[2, 4, 4, 3], DType::F32)?);
    assert_error(result, &["permute([0, 3, 1, 2])"]);
    let result = LabelSmoothingLoss::new(Smoothing::none())
        .forward(&zeros(&[3, 4], DType::F32)?, &zeros(&[4, 3], DType::F32)?);
    assert_error(result, &["[4, 3]", "permute([1, 0])"]);
    Ok(())
}

/// Floats are taken for class indices only if their shape is that of class indices.
#[test]
fn class_indices_in_a_float_dtype() -> Result<()> {
    let message = |logits: &[usize], targets: &[usize]| -> Result<String> {
        let result = loss().forward(&zeros(logits, DType::F32)?, &zeros(targets, DType::F32)?);
        Ok(result.expect_err("no error").to_string())
    };
    for (logits, targets) in
        [(&[3, 4][..], &[3][..]), (&[2, 3, 4], &[2, 3]), (&[2, 5, 3, 4], &[2, 3, 4]), (&[4], &[])]
    {
        let message = message(logits, targets)?;
        assert!(message.contains("to_dtype(DType::I64)"), "{message}");
        assert!(!message.contains("permute"), "{message}");
    }
    for targets in [&[2, 3, 5][..], &[3, 4, 4], &[7], &[2, 3, 4, 1], &[]] {
        let message = message(&[2, 3, 4], targets)?;
        assert!(message.ends_with(&format!("got {targets:?}")), "no hint fits: {message}");
    }
    Ok(())
}

#[test]
fn unsupported_dtypes() -> Result<()> {
    let labels = zeros(&[2], DType::U32)?;
    for dtype in [DType::U8, DType::U32, DType::I64, DType::F8E4M3] {
        let result = loss().forward(&zeros(&[2, 3], dtype)?, &labels);
        assert_error(result, &["logits", &format!("{dtype:?}"), "F32"]);
    }
    // Logits and targets swapped.
    let result = loss().forward(&labels, &zeros(&[2, 3], DType::F32)?);
    assert_error(result, &["U32", "forward(&logits, &targets)"]);
    // F8E8M0 holds the scale exponents of block formats, so it is neither a label nor a
    // probability.
    let storage = Storage::Cpu(candle_core::CpuStorage::F8E8M0(vec![0; 6]));
    let none = candle_core::op::BackpropOp::none();
    let scales = Tensor::from_storage(storage, Shape::from((2, 3)), none, false);
    let expected = ["targets", "F8E8M0", "class indices", "probabilities"];
    assert_error(loss().forward(&zeros(&[2, 3], DType::F32)?, &scales), &expected);
    assert_error(smooth_targets(&scales, 3, &Smoothing::none()), &expected);
    Ok(())
}

/// The kernels that benchmarks call give the results of `forward` and its backward pass.
#[test]
fn kernels_for_benchmarks_match_forward() -> Result<()> {
    let logits = Var::from_tensor(&random(&[4, 5], 3., 1)?)?;
    let labels = random_labels(&[4], 5, 2)?;
    let (losses, saved) = testing::forward_rows(&loss(), &logits, &labels)?;
    let rows = loss().with_reduction(Reduction::None).forward(&logits, &labels)?;
    assert_eq!(values(&losses)?, values(&rows)?);
    let saved = saved.expect("statistics");
    let grad_output = random(&[4], 1., 3)?;
    let gradients = (&rows * &grad_output)?.sum_all()?.backward()?;
    let gradient = testing::backward_rows(&saved, &logits, &grad_output)?;
    assert_eq!(values(&gradient)?, values(gradients.get(&logits).expect("no gradient"))?);
    let short = grad_output.narrow(0, 0, 3)?;
    assert_error(testing::backward_rows(&saved, &logits, &short), &["[4]", "[3]"]);
    assert_error(testing::backward_rows(&saved, &logits.t()?, &grad_output), &["[4, 5]", "[5, 4]"]);
    Ok(())
}

#[test]
fn ignore_index_with_probabilities() -> Result<()> {
    let logits = zeros(&[2, 3], DType::F32)?;
    let result = loss().with_ignore_index(-100).forward(&logits, &logits);
    let expected = ["ignore_index -100", "probabilities", "leave it unset", "weigh_rows"];
    assert_error(result, &expected);
    Ok(())
}

#[test]
fn metrics_of_probabilities() -> Result<()> {
    let (hidden, weight) = (random(&[2, 4], 1., 1)?, random(&[3, 4], 1., 2)?);
    let probabilities = (zeros(&[2, 3], DType::F32)? + 1. / 3.)?;
    let expected = ["F32", "probabilities", "metrics need class indices", "use forward"];
    let logits = zeros(&[2, 3], DType::F64)?;
    assert_error(loss().forward_with_metrics(&logits, &probabilities), &expected);
    let result = loss().forward_linear_with_metrics(&hidden, &weight, None, &probabilities);
    assert_error(result, &expected);
    // Other errors come first.
    let result = loss().forward_with_metrics(&logits, &zeros(&[2], DType::F32)?);
    assert_error(result, &["[2, 3]", "got [2]", "to_dtype(DType::I64)"]);
    Ok(())
}

#[test]
fn row_weights_of_another_dtype_or_shape() -> Result<()> {
    let (logits, labels) = (zeros(&[2, 3], DType::F32)?, zeros(&[2], DType::U32)?);
    let weighted = |weights: &Tensor| loss().weigh_rows(weights)?.forward(&logits, &labels);
    for dtype in [DType::U32, DType::I16, DType::I32, DType::I64] {
        let expected = ["row weights", &format!("{dtype:?}"), "U8", "to_dtype(DType::F32)"];
        assert_error(weighted(&zeros(&[2], dtype)?), &expected);
    }
    let storage = Storage::Cpu(candle_core::CpuStorage::F8E8M0(vec![0; 2]));
    let none = candle_core::op::BackpropOp::none();
    let scales = Tensor::from_storage(storage, Shape::from(2), none, false);
    assert_error(weighted(&scales), &["row weights", "F8E8M0"]);

    let forward = |class_dim: usize, weights: &[usize], targets: &[usize], dtype| {
        let loss = loss().with_class_dim(class_dim).weigh_rows(&zeros(weights, DType::U8)?)?;
        loss.forward(&zeros(&[2, 3, 4], DType::F32)?, &zeros(targets, dtype)?)
    };
    let expected = ["row weights", "[2, 4]", "[2, 3]", "[2, 3, 4]", "class dimension 2"];
    assert_error(forward(2, &[2, 4], &[2, 3], DType::U32), &expected);
    let expected = ["row weights", "[2, 3]", "[2, 4]", "[2, 3, 4]", "class dimension 1"];
    assert_error(forward(1, &[2, 3], &[2, 4], DType::U32), &expected);
    assert_error(forward(2, &[6], &[2, 3], DType::U32), &["[6]", "[2, 3]"]);
    // With probabilities, the row weights do not have the targets' shape.
    assert_error(forward(2, &[2, 3, 4], &[2, 3, 4], DType::F32), &["expected [2, 3]"]);

    let (hidden, weight) = (random(&[2, 4], 1., 1)?, random(&[3, 4], 1., 2)?);
    let loss = loss().weigh_rows(&zeros(&[3], DType::F32)?)?;
    let result = loss.forward_linear(&hidden, &weight, None, &zeros(&[2], DType::U32)?);
    assert_error(result, &["row weights", "[3]", "[2]", "[2, 3]"]);
    Ok(())
}

/// The row in the message counts over all dimensions and, in `forward_linear`, over all tiles.
#[test]
fn row_weights_that_are_negative_or_not_finite() -> Result<()> {
    let logits = zeros(&[2, 3, 4], DType::F32)?;
    let (labels, probabilities) = (zeros(&[2, 3], DType::U32)?, zeros(&[2, 3, 4], DType::F32)?);
    let bad =
        [(-1f32, "-1"), (f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")];
    for (value, given) in bad {
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            let weights = Tensor::new(&[[1f32, 0., 2.], [1., value, value]], &CPU)?;
            let weighted = loss().weigh_rows(&weights.to_dtype(dtype)?)?;
            let expected = ["weight of row 4", given, "finite number >= 0"];
            assert_error(weighted.forward(&logits, &labels), &expected);
            assert_error(weighted.forward(&logits, &probabilities), &expected);
            assert_error(weighted.forward_with_metrics(&logits, &labels), &expected);
        }
        // Views: the rows are counted in the order of the weights' dimensions.
        let transposed = Tensor::new(&[[1f32, 1.], [1., value], [1., 1.]], &CPU)?.t()?;
        let result = loss().weigh_rows(&transposed)?.forward(&logits, &labels);
        assert_error(result, &["weight of row 4", given]);

        let (hidden, weight) = (random(&[2, 3, 4], 1., 1)?, random(&[5, 4], 1., 2)?);
        let weights = Tensor::new(&[[1f32, 0., 2.], [1., value, value]], &CPU)?;
        let weighted = loss().weigh_rows(&weights)?;
        let expected = ["weight of row 4", given];
        let result = weighted.forward_linear(&hidden, &weight, None, &labels);
        assert_error(result, &expected);
        let result = weighted.forward_linear_with_metrics(&hidden, &weight, None, &labels);
        assert_error(result, &expected);
        let tile = testing::TileSize { rows: 2, classes: 3 };
        let result =
            testing::forward_linear_tiled(&weighted, &hidden, &weight, None, &labels, tile);
        assert_error(result, &expected);
    }
    // -0 is 0, and a u8 is a number.
    let weights = Tensor::new(&[[1f32, -0., 2.]; 2], &CPU)?;
    assert!(loss().weigh_rows(&weights)?.forward(&logits, &labels).is_ok());
    let weights = Tensor::new(&[[1u8, 255, 2]; 2], &CPU)?;
    assert!(loss().weigh_rows(&weights)?.forward(&logits, &labels).is_ok());
    Ok(())
}

/// Row weights are rounded to the dtype of the arithmetic.
#[test]
fn row_weights_beyond_f32() -> Result<()> {
    let logits = zeros(&[3, 4], DType::F32)?;
    let labels = zeros(&[3], DType::U32)?;
    let large = loss().weigh_rows(&Tensor::new(&[1f64, 1e300, 1.], &CPU)?)?;
    assert_error(
        large.forward(&logits, &labels),
        &["weight of row 1 is 1e300", "the range of f32"],
    );
    let mean = large.forward(&logits.to_dtype(DType::F64)?, &labels)?.to_scalar::<f64>()?;
    assert!((mean - 4f64.ln()).abs() < 1e-15, "{mean}");

    // In f32 the row of weight 1e-300 is ignored, and its target is not looked at.
    let small = loss().weigh_rows(&Tensor::new(&[1f64, 1e-300, 1.], &CPU)?)?;
    let labels = Tensor::new(&[0u32, 9, 0], &CPU)?;
    let mean = small.forward(&logits, &labels)?.to_scalar::<f32>()?;
    assert_eq!(mean, 4f32.ln());
    assert_error(small.forward(&logits.to_dtype(DType::F64)?, &labels), &["target 9 of row 1"]);
    let (hidden, weight) = (zeros(&[3, 2], DType::F32)?, zeros(&[4, 2], DType::F32)?);
    assert_eq!(small.forward_linear(&hidden, &weight, None, &labels)?.to_scalar::<f32>()?, mean);

    let negative = loss().weigh_rows(&Tensor::new(&[1f64, -1e-300, 1.], &CPU)?)?;
    assert_error(negative.forward(&logits, &labels), &["weight of row 1 is -1e-300"]);
    Ok(())
}

/// A common factor of the row weights changes no mean, even if its product with a loss is beyond f32.
#[test]
fn row_weights_at_the_limits_of_f32() -> Result<()> {
    let logits = Tensor::new(&[[0f32, 10.], [0., 0.]], &CPU)?;
    let labels = Tensor::new(&[0u32, 1], &CPU)?;
    let class_weights = Tensor::full(2e-31f32, 2, &CPU)?;
    let plain = LabelSmoothingLoss::new(Smoothing::none());
    let expected = (10f64.exp().ln_1p() + 2f64.ln()) / 2.;
    for loss in [plain.clone(), plain.with_class_weights(&class_weights)?] {
        for weight in [3e38f32, 1e-20, 1e-45] {
            let weighted = loss.weigh_rows(&Tensor::full(weight, 2, &CPU)?)?;
            for reduction in [Reduction::Mean, Reduction::MeanOrZero] {
                let weighted = weighted.clone().with_reduction(reduction);
                let mean = f64::from(weighted.forward(&logits, &labels)?.to_scalar::<f32>()?);
                assert!((mean - expected).abs() < 1e-6, "{weight}: {mean}, expected {expected}");
            }
        }
    }
    Ok(())
}

/// The target of a row of weight 0 is not looked at; those of other rows are.
#[test]
fn targets_of_rows_of_weight_0() -> Result<()> {
    let logits = zeros(&[3, 4], DType::F32)?;
    let masked = loss().weigh_rows(&Tensor::new(&[1u8, 0, 1], &CPU)?)?;
    assert!(masked.forward(&logits, &Tensor::new(&[0i64, 99, 3], &CPU)?).is_ok());
    let result = masked.forward(&logits, &Tensor::new(&[0i64, 99, 4], &CPU)?);
    assert_error(result, &["target 4", "row 2"]);
    let (hidden, weight) = (random(&[3, 2], 1., 1)?, random(&[4, 2], 1., 2)?);
    let forward = |labels: &[i64; 3]| {
        masked.forward_linear(&hidden, &weight, None, &Tensor::new(labels, &CPU)?)
    };
    assert!(forward(&[0, 99, 3]).is_ok());
    assert_error(forward(&[0, 99, 4]), &["target 4", "row 2"]);
    Ok(())
}

#[test]
fn one_class_has_no_others() -> Result<()> {
    let others = Smoothing::over_others(0.1)?;
    let labels = zeros(&[2], DType::U32)?;
    let logits = zeros(&[2, 1], DType::F32)?;
    let result = LabelSmoothingLoss::new(others.clone()).forward(&logits, &labels);
    assert_error(result, &["at least two classes", "over_all"]);
    assert_error(smooth_targets(&labels, 1, &others), &["at least two classes"]);
    Ok(())
}

#[test]
fn targets_out_of_range() -> Result<()> {
    let logits = zeros(&[3, 5], DType::F32)?;
    let targets = |values: [i64; 3]| Tensor::new(&values, &CPU);
    let forward = |values| loss().forward(&logits, &targets(values)?);
    assert_error(forward([0, 5, 9]), &["target 5", "row 1", "less than 5", "from 0"]);
    let far = forward([0, 6, 9]).expect_err("no error").to_string();
    assert!(far.ends_with("less than 5"), "no hint fits: {far}");
    assert_error(forward([0, 4, -100]), &["target -100", "row 2", "with_ignore_index(-100)"]);
    assert_error(forward([i64::MIN, 0, 0]), &["target -9223372036854775808", "row 0"]);
    let padded = targets([0, 1, -100])?.to_dtype(DType::U32)?;
    assert_error(
        loss().forward(&logits, &padded),
        &[
            "target 4294967196",
            "-100 before it was a u32",
            "i64 from the start and use with_ignore_index(-100)",
            "or use with_ignore_index(4294967196)",
        ],
    );
    let unlabelled = targets([0, 255, 1])?.to_dtype(DType::U8)?;
    assert_error(loss().forward(&logits, &unlabelled), &["target 255", "with_ignore_index(255)"]);
    let result = loss().forward(&zeros(&[3, 1], DType::F32)?, &targets([0, 1, 0])?);
    assert_error(result, &["target 1", "less than 1", "two logits"]);
    // The ignore_index may be out of range. Other targets may not.
    let ignoring = loss().with_ignore_index(-1);
    assert!(ignoring.forward(&logits, &targets([0, -1, 4])?).is_ok());
    assert_error(ignoring.forward(&logits, &targets([0, -1, -2])?), &["target -2", "row 2"]);
    // The row in the message counts rows in row-major order over all dimensions but the classes.
    let image = zeros(&[2, 5, 2, 2], DType::F32)?;
    let labels = Tensor::new(&[[[0u8, 1], [2, 3]], [[4, 0], [7, 0]]], &CPU)?;
    let result = loss().with_class_dim(1).forward(&image, &labels);
    assert_error(result, &["target 7", "row 6", "less than 5"]);

    assert_error(
        smooth_targets(&targets([0, 1, 3])?, 3, &Smoothing::none()),
        &["target 3", "row 2", "less than 3"],
    );
    Ok(())
}

/// Each function advises its own way to ignore a target, and `smooth_targets`, which has none, advises nothing.
#[test]
fn advice_for_ignored_targets_fits_the_function() -> Result<()> {
    let logits = zeros(&[1, 5], DType::F32)?;
    for (target, dtype, index) in [
        (-100i64, DType::I64, -100),
        (-1, DType::I64, -1),
        (255, DType::U8, 255),
        (-1, DType::U32, -1),
        (-100, DType::U32, -100),
    ] {
        let targets = Tensor::new(&[target], &CPU)?.to_dtype(dtype)?;
        let (option, argument) =
            (format!("with_ignore_index({index})"), format!("pass Some({index}) as ignore_index"));
        let message = |error: Error| error.to_string();
        let result = loss().forward(&logits, &targets);
        let of_loss = message(result.expect_err("no error"));
        assert!(of_loss.contains(&option) && !of_loss.contains(&argument), "{of_loss}");
        let of_check = message(check_targets(&targets, 5, None).expect_err("no error"));
        assert!(of_check.contains(&argument) && !of_check.contains(&option), "{of_check}");
        let result = smooth_targets(&targets, 5, &Smoothing::none());
        let of_smooth = message(result.expect_err("no error"));
        assert!(!of_smooth.contains("ignore"), "{of_smooth}");
        assert_eq!(of_smooth.contains("before it was a u32"), dtype == DType::U32, "{of_smooth}");
        assert_error(loss().forward(&logits, &targets), &[&option]);
        assert_error(check_targets(&targets, 5, None), &[&argument]);

        // The advice works. A u32 is to become an i64 before.
        let targets = Tensor::new(&[target], &CPU)?;
        assert!(loss().with_ignore_index(index).forward(&logits, &targets).is_ok());
        assert!(check_targets(&targets, 5, Some(index)).is_ok());
    }
    Ok(())
}

#[test]
fn check_targets_reports_invalid_targets() -> Result<()> {
    let targets = Tensor::new(&[[0i64, 2], [-100, 3]], &CPU)?;
    assert_error(check_targets(&targets, 4, None), &["target -100", "row 2"]);
    assert_error(check_targets(&targets, 3, Some(-100)), &["target 3", "row 3"]);
    assert!(check_targets(&targets, 4, Some(-100)).is_ok());
    assert!(check_targets(&targets.narrow(0, 0, 1)?.t()?, 3, None).is_ok());
    assert!(check_targets(&zeros(&[0], DType::U8)?, 0, None).is_ok());
    let probabilities = zeros(&[2, 3], DType::F32)?;
    assert_error(check_targets(&probabilities, 3, None), &["F32", "integer dtype"]);
    let result = check_targets(&zeros(&[1], DType::U8)?, 0, None);
    assert_error(result, &["target 0", "less than 0"]);
    Ok(())
}

#[test]
fn smooth_targets_rejects_invalid_arguments() -> Result<()> {
    let none = Smoothing::none();
    let labels = zeros(&[2], DType::U32)?;
    assert_error(smooth_targets(&labels, 0, &none), &["no classes", "[2, 0]"]);
    let probabilities = zeros(&[2, 3], DType::F32)?;
    assert_error(smooth_targets(&probabilities, 4, &none), &["F32", "num_classes = 4", "[2, 3]"]);
    let as_floats = labels.to_dtype(DType::F32)?;
    assert_error(smooth_targets(&as_floats, 4, &none), &["F32", "[2]", "to_dtype(DType::I64)"]);
    let scalar = zeros(&[], DType::F32)?;
    assert_error(smooth_targets(&scalar, 4, &none), &["num_classes = 4", "[]"]);
    assert_error(smooth_targets(&labels, usize::MAX, &none), &["too large"]);
    let unmasked = Smoothing::over_unmasked(0.1)?;
    let expected = ["smooth_targets", "mask", "Smoothing::over_unmasked", "the loss itself"];
    assert_error(smooth_targets(&labels, 4, &unmasked), &expected);
    assert_error(smooth_targets(&probabilities, 3, &unmasked), &expected);
    Ok(())
}

/// A view can be far larger than its storage. The errors are about the memory that the result
/// needs.
#[test]
fn sizes_beyond_memory_are_errors() -> Result<()> {
    let one = zeros(&[1, 1], DType::F32)?;
    let labels = zeros(&[1], DType::U32)?;
    let dims = (1 << 30, 1 << 31);
    let result = loss().forward(&one.broadcast_as(dims)?, &labels.broadcast_as(1 << 30)?);
    assert_error(result, &["logits", "[1073741824, 2147483648]", "too large"]);
    let vast = 1usize << 50;
    for dtype in [DType::I16, DType::I32, DType::F8E4M3] {
        let one = zeros(&[1], dtype)?;
        let vector = loss().with_class_weights(&one.broadcast_as(vast)?);
        if dtype.is_int() {
            let many = one.broadcast_as(vast)?;
            assert_error(check_targets(&many, 8, None), &["too large"]);
            assert_error(smooth_targets(&many, 8, &Smoothing::none()), &["too large"]);
            assert!(vector.is_err());
        } else {
            let many = one.broadcast_as((vast, 1))?;
            assert_error(smooth_targets(&many, 1, &Smoothing::none()), &["too large"]);
            assert_error(vector, &["class weights", "too large"]);
        }
    }
    let many = labels.broadcast_as(1 << 59)?;
    assert_error(smooth_targets(&many, 8, &Smoothing::none()), &["too large"]);
    assert_error(check_targets(&many, 8, None), &["too large"]);
    let wide = labels.reshape((1, 1))?.broadcast_as((1 << 59, 64))?;
    assert_error(loss().forward(&one, &wide), &["[576460752303423488, 64]", "[1]"]);
    let one = one.broadcast_as((1 << 59, 1))?;
    assert_error(loss().forward(&one, &many), &["too large"]);
    Ok(())
}

/// The CPU stores class indices in 32 bits. Only probabilities allow more classes.
#[test]
fn class_indices_beyond_32_bits() -> Result<()> {
    let logits = zeros(&[1, 1], DType::F32)?.broadcast_as((1, (1 << 32) + 1))?;
    let result = loss().forward(&logits, &zeros(&[1], DType::U32)?);
    assert_error(result, &["class indices beyond 32 bits", "4294967297", "too large"]);
    Ok(())
}

/// candle's unchecked constructor makes tensors whose layout exceeds their storage.
#[test]
fn layouts_beyond_their_storage() -> Result<()> {
    let lying = |storage: Storage| {
        let none = candle_core::op::BackpropOp::none();
        Tensor::from_storage(storage, Shape::from((2, 3)), none, false)
    };
    let logits = lying(Storage::Cpu(candle_core::CpuStorage::F32(vec![0.; 5])));
    let labels = zeros(&[2], DType::U32)?;
    let expected = ["[2, 3]", "beyond its storage of 5"];
    assert_error(loss().forward(&logits, &labels), &expected);
    assert_error(smooth_targets(&logits, 3, &Smoothing::none()), &expected);
    let labels = lying(Storage::Cpu(candle_core::CpuStorage::U8(vec![0; 5])));
    let logits = zeros(&[2, 3, 4], DType::F32)?;
    assert_error(loss().forward(&logits, &labels), &expected);
    assert_error(check_targets(&labels, 4, None), &expected);

    // The check precedes candle's own operations on the tensor.
    let vector = |len, shape: &[usize]| {
        let none = candle_core::op::BackpropOp::none();
        let storage = Storage::Cpu(candle_core::CpuStorage::F32(vec![1.; len]));
        Tensor::from_storage(storage, Shape::from(shape), none, false)
    };
    let expected = ["[5]", "beyond its storage of 2"];
    assert_error(loss().with_class_weights(&vector(2, &[5])), &expected);
    assert_error(Smoothing::toward(0.1, &vector(2, &[5])), &expected);
    let (hidden, weight, bias) = (vector(8, &[2, 4]), vector(12, &[3, 4]), vector(3, &[3]));
    let labels = zeros(&[2], DType::U32)?;
    loss().forward_linear(&hidden, &weight, Some(&bias), &labels)?;
    let result = loss().forward_linear(&vector(7, &[2, 4]), &weight, Some(&bias), &labels);
    assert_error(result, &["[2, 4]", "beyond its storage of 7"]);
    let result = loss().forward_linear(&hidden, &vector(11, &[3, 4]), Some(&bias), &labels);
    assert_error(result, &["[3, 4]", "beyond its storage of 11"]);
    let result = loss().forward_linear(&hidden, &weight, Some(&vector(2, &[3])), &labels);
    assert_error(result, &["[3]", "beyond its storage of 2"]);
    let short = Storage::Cpu(candle_core::CpuStorage::U32(vec![0; 1]));
    let none = candle_core::op::BackpropOp::none();
    let labels = Tensor::from_storage(short, Shape::from(2), none, false);
    let result = loss().forward_linear(&hidden, &weight, Some(&bias), &labels);
    assert_error(result, &["[2]", "beyond its storage of 1"]);
    Ok(())
}

/// Class weights that underflow, or overflow alone or in a sum, would give an infinite or NaN loss
/// or gradient.
#[test]
fn class_weights_beyond_the_range_of_the_arithmetic() -> Result<()> {
    let labels = Tensor::new(&[1u32, 1], &CPU)?;
    let run = |weight: f64, dtype| -> candle_label_smoothing::Result<Tensor> {
        let weighted = loss().with_class_weights(&Tensor::new(&[1., weight, 0.], &CPU)?)?;
        let logits = Var::from_tensor(&Tensor::new(&[[1f32, 2., 3.]; 2], &CPU)?.to_dtype(dtype)?)?;
        let gradients = weighted.forward(&logits, &labels)?.backward()?;
        Ok(gradients.get(&logits).expect("no gradient").clone())
    };
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        for (weight, shown) in [(1e39, "1e39"), (3e31, "3e31"), (1e-31, "1e-31"), (1e-46, "1e-46")]
        {
            let expected = ["class weight ", shown, "class 1", "from 2.0e-31 to 2.0e31"];
            assert_error(run(weight, dtype), &expected);
        }
    }
    assert_error(run(2e301, DType::F64), &["class weight 2e301", "from 3.7e-301 to 1.1e301"]);
    assert_error(run(1e-310, DType::F64), &["class weight 1e-310"]);
    // A weighted mean over labels of one class does not depend on the class weight.
    let plain = values(&run(1., DType::F64)?)?;
    for (weight, dtype) in
        [(2e31, DType::F32), (2e-31, DType::F32), (1e301, DType::F64), (4e-301, DType::F64)]
    {
        for (actual, expected) in values(&run(weight, dtype)?)?.iter().zip(&plain) {
            assert!((actual - expected).abs() < 1e-6, "{weight}: {actual}, expected {expected}");
        }
    }
    Ok(())
}

/// A message has no hint where the hint would be wrong.
#[test]
fn misleading_hints_are_left_out() -> Result<()> {
    let message = |logits: &[usize], targets: &[usize]| -> Result<String> {
        let result = loss().forward(&zeros(logits, DType::F32)?, &zeros(targets, DType::U32)?);
        Ok(result.expect_err("no error").to_string())
    };
    // Batch and time are swapped here, so reshaping would mix up the dimensions.
    assert!(!message(&[5, 2, 7], &[2, 5])?.contains("reshape"));
    assert!(message(&[5, 2, 7], &[10])?.contains("reshape"));
    assert!(message(&[5, 2, 7], &[5, 2, 1])?.contains("reshape"));
    // Targets of a single column are not one-hot.
    assert!(message(&[4, 1], &[4, 1])?.contains("two logits"));
    assert!(message(&[4, 2], &[4, 2])?.contains("one-hot"));
    let counted_from_1 = Tensor::new(&[255u32], &CPU)?;
    assert_error(check_targets(&counted_from_1, 255, None), &["counted from 0"]);
    let message = check_targets(&zeros(&[1], DType::U32)?, 0, None).expect_err("no error");
    let message = message.to_string();
    assert!(!message.contains("counted") && !message.contains("ignore_index"), "{message}");
    let beyond_one_class = Tensor::new(&[5u32], &CPU)?;
    let result = loss().forward(&zeros(&[1, 1], DType::F32)?, &beyond_one_class);
    let message = result.expect_err("no error").to_string();
    assert!(!message.contains("two logits"), "{message}");
    Ok(())
}

/// Views of hidden states and weight whose hidden size exceeds memory.
#[test]
fn hidden_sizes_beyond_memory_are_errors() -> Result<()> {
    let labels = zeros(&[1], DType::U32)?;
    for len in [1 << 45, 1 << 61, usize::MAX >> 1] {
        let view = zeros(&[1, 1], DType::F32)?.broadcast_as((1, len))?;
        let result = loss().forward_linear(&view, &view, None, &labels);
        assert_error(result, &["too large for memory", &len.to_string()]);
    }
    Ok(())
}

/// A variable's values can change between forward and backward.
#[test]
fn targets_changed_before_backward_are_checked_again() -> Result<()> {
    let targets = Var::from_tensor(&Tensor::new(&[0i64, 1], &CPU)?)?;
    let logits = Var::from_tensor(&random(&[2, 3], 1., 1)?)?;
    let result = loss().forward(&logits, &targets)?;
    targets.set(&Tensor::new(&[0i64, 3], &CPU)?)?;
    let error = result.backward().expect_err("no error from backward");
    assert_error(Err::<(), _>(Error::from(error)), &["target 3", "row 1"]);
    Ok(())
}

/// `?` converts errors in both directions.
#[test]
fn errors_survive_conversion_to_candle_and_back() -> Result<()> {
    fn model(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
        Ok(loss.with_reduction(Reduction::Sum).forward(logits, targets)?)
    }
    fn again(logits: &Tensor, targets: &Tensor) -> candle_label_smoothing::Result<Tensor> {
        Ok(model(logits, targets)?)
    }
    let logits = random(&[2, 3], 1., 1)?;
    let targets = Tensor::new(&[0u32, 3], &CPU)?;
    let error = again(&logits, &targets).expect_err("no error");
    assert!(
        matches!(error, Error::TargetOutOfRange { row: 1, target: 3, num_classes: 3, .. }),
        "{error}"
    );

    // candle's own errors are unchanged after conversion and back.
    let candle_error = logits.reshape((7, 7)).expect_err("no error from candle");
    let message = candle_error.to_string();
    let back = candle_core::Error::from(Error::from(candle_error));
    assert_eq!(back.to_string(), message);
    let wrapped = Error::from(candle_core::Error::WrappedContext {
        wrapped: Box::new(std::io::Error::other("elsewhere")),
        context: "foreign".to_string(),
    });
    assert!(wrapped.to_string().contains("elsewhere"));
    assert!(candle_core::Error::from(wrapped).to_string().contains("foreign"));
    Ok(())
}

/// Losses can be shared between threads, and errors can be sent between them.
#[test]
fn public_types_are_send_sync_and_debug() {
    fn check<T: Send + Sync + std::fmt::Debug>() {}
    check::<LabelSmoothingLoss>();
    check::<Smoothing>();
    check::<Reduction>();
    check::<Metrics>();
    check::<Error>();
}

/// These errors need a GPU to occur, so the test checks only their messages.
#[test]
fn device_errors_name_the_device_and_the_dtype() {
    let double = Error::MetalF64 { what: "logits" };
    assert_error(Err::<(), _>(double), &["logits", "F64", "Metal", "F32", "CPU"]);
    let mismatch = Error::DeviceMismatch {
        logits: DeviceLocation::Cuda { gpu_id: 0 },
        targets: DeviceLocation::Cpu,
    };
    assert_error(Err::<(), _>(mismatch), &["logits", "Cuda", "targets", "Cpu"]);
    let mismatch = Error::RowWeightsDevice {
        logits: DeviceLocation::Cuda { gpu_id: 0 },
        weights: DeviceLocation::Cpu,
    };
    let expected = ["logits", "Cuda", "row weights", "Cpu", "weights.to_device(logits.device())"];
    assert_error(Err::<(), _>(mismatch), &expected);
}
