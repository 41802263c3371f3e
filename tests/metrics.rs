//! The metrics of the rows against a scalar computation in f64, and the loss that comes with them.

mod common;

use candle_core::{DType, Result, Tensor, Var};
use candle_label_smoothing::testing::{self, TileSize};
use candle_label_smoothing::{LabelSmoothingLoss, Metrics, Reduction, Smoothing};
use common::{
    CPU, OnDevice, assert_same, dtypes, fewer_where_slow, grid, on_device, random, random_labels,
    sum_with_grad_output, values,
};

const INF: f64 = f64::INFINITY;
const NAN: f64 = f64::NAN;

/// The fields in order: nll, prediction, correct, confidence, entropy, lse and counted.
type Row = [f64; 7];
const FIELDS: [&str; 7] =
    ["nll", "prediction", "correct", "confidence", "entropy", "lse", "counted"];

/// The metrics of a row that counts, whose logits are already scaled and capped.
fn expected_row(x: &[f64], label: usize) -> Row {
    let max = x.iter().copied().fold(-INF, f64::max);
    if max == -INF || x.iter().any(|x| x.is_nan()) {
        return [NAN, 0., 0., NAN, NAN, NAN, 1.];
    }
    let lse = max + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
    let entropy = x.iter().filter(|x| **x > -INF).map(|x| (x - lse).exp() * (lse - x)).sum();
    let prediction = x.iter().position(|x| *x == max).expect("a largest logit");
    let correct = f64::from(u8::from(prediction == label));
    [lse - x[label], prediction as f64, correct, (max - lse).exp(), entropy, lse, 1.]
}

fn rows_of(metrics: &Metrics) -> Result<Vec<Row>> {
    let Metrics { nll, prediction, correct, confidence, entropy, lse, counted, .. } = metrics;
    let fields = [nll, prediction, correct, confidence, entropy, lse, counted];
    let fields = fields.map(|field| values(&field.to_device(&CPU)?));
    let fields: Vec<Vec<f64>> = fields.into_iter().collect::<Result<_>>()?;
    Ok((0..fields[0].len()).map(|row| std::array::from_fn(|i| fields[i][row])).collect())
}

/// The tolerance, relative to numbers above 1.
fn roundings(dtype: DType) -> f64 {
    if dtype == DType::F64 { 1e-12 } else { 4e-6 }
}

fn check_rows(name: &str, dtype: DType, actual: &[Row], expected: &[Row]) {
    assert_eq!(actual.len(), expected.len(), "{name}");
    for (row, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        for (field, (actual, expected)) in FIELDS.iter().zip(actual.iter().zip(expected)) {
            let close = (actual - expected).abs() <= roundings(dtype) * expected.abs().max(1.);
            assert!(
                close || actual == expected || actual.is_nan() && expected.is_nan(),
                "{name} {dtype:?}, row {row}: {field} is {actual}, expected {expected}"
            );
        }
    }
}

/// Compares each mean with that of the rows that count.
fn check_means(name: &str, dtype: DType, metrics: &Metrics, rows: &[Row]) -> Result<()> {
    let count: f64 = rows.iter().map(|row| row[6]).sum();
    let mean = |i: usize| rows.iter().map(|row: &Row| row[i]).sum::<f64>() / count.max(1.);
    for (what, actual, expected) in [
        ("count", metrics.count()?, count),
        ("mean_nll", metrics.mean_nll()?, mean(0)),
        ("accuracy", metrics.accuracy()?, mean(2)),
        ("mean_confidence", metrics.mean_confidence()?, mean(3)),
        ("mean_entropy", metrics.mean_entropy()?, mean(4)),
    ] {
        assert_eq!(actual.dims(), [0usize; 0], "{name} {what}");
        assert_eq!(actual.dtype(), metrics.nll.dtype(), "{name} {what}");
        let actual = values(&actual.to_device(&CPU)?)?[0];
        let close = (actual - expected).abs() <= roundings(dtype) * expected.abs().max(1.);
        assert!(
            close || actual == expected || actual.is_nan() && expected.is_nan(),
            "{name} {dtype:?}: {what} is {actual}, expected {expected}"
        );
    }
    Ok(())
}

/// A loss and what of it the metrics depend on.
struct Options {
    name: &'static str,
    loss: LabelSmoothingLoss,
    scale: f64,
    cap: Option<f64>,
    ignore_index: Option<i64>,
    row_weights: Option<Tensor>,
}

/// Losses for logits with `num_classes` classes in dimension `class_dim`.
fn options(class_dim: usize, num_classes: usize, rows: &[usize]) -> Result<Vec<Options>> {
    let num_rows: usize = rows.iter().product();
    let mask: Vec<u8> = (0..num_rows).map(|row| [3, 0, 1][row % 3]).collect();
    let mask = Tensor::from_vec(mask, rows, &CPU)?;
    let class_weights = random(&[num_classes], 1., 4)?.abs()?;
    let new = |smoothing| LabelSmoothingLoss::new(smoothing).with_class_dim(class_dim);
    let plain = |name, loss| Options {
        name,
        loss,
        scale: 1.,
        cap: None,
        ignore_index: None,
        row_weights: None,
    };
    let unmasked = Smoothing::over_unmasked(0.1)?;
    Ok(vec![
        plain("none", new(Smoothing::none())),
        plain("over_unmasked", new(unmasked.clone()).with_reduction(Reduction::None)),
        Options {
            ignore_index: Some(0),
            ..plain(
                "ignoring 0, class weights",
                new(Smoothing::over_all(0.1)?)
                    .with_ignore_index(0)
                    .with_class_weights(&class_weights)?
                    .with_z_loss(0.1)?,
            )
        },
        Options {
            row_weights: Some(mask.clone()),
            ..plain("row weights", new(Smoothing::none()).with_reduction(Reduction::Sum))
        },
        Options { scale: 0.5, ..plain("scale", new(Smoothing::none()).with_logit_scale(0.5)?) },
        Options { cap: Some(2.), ..plain("softcap", new(Smoothing::none()).with_softcap(2.)?) },
        Options {
            scale: 2.,
            cap: Some(4.),
            ignore_index: Some(0),
            row_weights: Some(mask.to_dtype(DType::F32)?),
            ..plain(
                "all",
                new(unmasked)
                    .with_logit_scale(2.)?
                    .with_softcap(4.)?
                    .with_ignore_index(0)
                    .with_class_weights(&class_weights)?
                    .with_reduction(Reduction::MeanOrZero),
            )
        },
    ])
}

impl Options {
    fn map(&self, x: f64) -> f64 {
        match self.cap {
            Some(cap) if x > -INF => cap * (self.scale * x / cap).tanh(),
            _ => self.scale * x,
        }
    }

    /// The expected metrics for the rounded logits.
    fn expected(&self, logits: &Tensor, class_dim: usize, labels: &Tensor) -> Result<Vec<Row>> {
        let mut order: Vec<usize> = (0..logits.rank()).filter(|dim| *dim != class_dim).collect();
        order.push(class_dim);
        let num_classes = logits.dim(class_dim)?;
        let labels = values(labels)?;
        let weights = match &self.row_weights {
            Some(weights) => values(weights)?,
            None => vec![1.; labels.len()],
        };
        let x = values(&logits.permute(order)?)?;
        let rows = x.chunks(num_classes).zip(labels).zip(weights);
        Ok(rows
            .map(|((x, label), weight)| {
                if weight == 0. || Some(label as i64) == self.ignore_index {
                    return [0.; 7];
                }
                let x: Vec<f64> = x.iter().map(|x| self.map(*x)).collect();
                expected_row(&x, label as usize)
            })
            .collect())
    }

    fn check(&self, name: &str, logits: &Tensor, dim: usize, labels: &Tensor) -> Result<()> {
        let (name, dtype) = (format!("{name}, {}", self.name), logits.dtype());
        let metrics = self.loss.metrics_on_device(self.row_weights.as_ref(), logits, labels)?.1;
        let expected = self.expected(logits, dim, labels)?;
        check_rows(&name, dtype, &rows_of(&metrics)?, &expected);
        check_means(&name, dtype, &metrics, &expected)
    }
}

/// Some logits are −inf, and some of these are the label's.
fn masked_logits(dims: &[usize]) -> Result<Tensor> {
    let logits = random(dims, 6., 1)?;
    let mask = random(dims, 1., 5)?.lt(-0.8)?;
    mask.where_cond(&Tensor::full(-INF, dims, &CPU)?, &logits)
}

#[test]
fn metrics_match_a_scalar_computation_for_every_class_count() -> Result<()> {
    let mut counts = vec![1, 2, 5, 31, 32, 33, 255, 256, 257, 1000, 16_385, 33_000];
    if cfg!(emulator) {
        // The emulated threads are too slow for more classes.
        counts.truncate(10);
    }
    for num_classes in counts {
        let rows = if num_classes > 10_000 { 1 } else { 3 };
        for (dims, dim) in [
            (vec![rows + 1, num_classes], 1),
            (vec![num_classes, rows], 0),
            (vec![2, num_classes, rows], 1),
        ] {
            let mut rows = dims.clone();
            rows.remove(dim);
            let labels = random_labels(&rows, num_classes, 2)?;
            for dtype in dtypes() {
                let logits = masked_logits(&dims)?.to_dtype(dtype)?;
                // With many classes the first option and all of them together are enough.
                let step = if num_classes > 10_000 { 6 } else { 1 };
                for options in options(dim, num_classes, &rows)?.iter().step_by(step) {
                    options.check(&format!("{dims:?}"), &logits, dim, &labels)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn metrics_of_views_match() -> Result<()> {
    let labels = random_labels(&[4, 3], 6, 2)?;
    for dtype in dtypes() {
        let base = random(&[3, 9, 5], 4., 1)?.to_dtype(dtype)?;
        let row = random(&[1, 1, 6], 4., 1)?.to_dtype(dtype)?;
        for (name, logits) in [
            ("permuted", base.narrow(1, 2, 6)?.narrow(2, 1, 4)?.permute((2, 0, 1))?),
            ("broadcast", row.broadcast_as((4, 3, 6))?),
        ] {
            for options in options(2, 6, &[4, 3])? {
                options.check(name, &logits, 2, &labels)?;
            }
        }
        // The labels are a view too.
        let logits = random(&[3, 4, 6], 4., 1)?.to_dtype(dtype)?;
        options(2, 6, &[3, 4])?[0].check("labels", &logits, 2, &labels.t()?)?;
    }
    Ok(())
}

/// Two, three or all logits of a row are equal, also in different blocks of classes.
#[test]
fn the_first_of_equal_logits_is_predicted() -> Result<()> {
    for num_classes in [2, 33, 300, 1000, 20_000] {
        for dtype in dtypes() {
            for dim in [0, 1] {
                let last = num_classes - 1;
                let equal = [vec![0, last], vec![last / 2, last], vec![last / 3, last / 2, last]];
                let mut logits = vec![vec![-1f32; num_classes]; 4];
                for (row, classes) in equal.iter().enumerate() {
                    classes.iter().for_each(|class| logits[row][*class] = 2.);
                }
                let mut logits = Tensor::new(logits, &CPU)?.to_dtype(dtype)?;
                if dim == 0 {
                    logits = logits.t()?.contiguous()?;
                }
                let labels = Tensor::new(&[0, last as u32, last as u32, 0], &CPU)?;
                let plain = &options(dim, num_classes, &[4])?[0];
                plain.check(&format!("{num_classes}"), &logits, dim, &labels)?;
                let metrics = plain.loss.metrics_on_device(None, &logits, &labels)?.1;
                let expected = [0, last / 2, last / 3, 0].map(|class| class as u32);
                assert_eq!(metrics.prediction.to_vec1::<u32>()?, expected, "{num_classes}");
                let correct = values(&metrics.correct.to_device(&CPU)?)?;
                assert_eq!(correct, [1., 0., 0., 1.], "{num_classes}");
            }
        }
    }
    Ok(())
}

/// The literals are the metrics of the logits 0 and 1.
#[test]
fn metrics_of_two_classes() -> Result<()> {
    let logits = Tensor::new(&[[0f64, 1.], [0., 1.], [0., 1.]], &CPU)?;
    let labels = Tensor::new(&[0u32, 1, 1], &CPU)?;
    let weights = Tensor::new(&[1u8, 2, 0], &CPU)?;
    let loss = LabelSmoothingLoss::new(Smoothing::none());
    let (lse, p, entropy) =
        (1.313_261_687_518_222_8, 0.731_058_578_630_004_9, 0.582_203_108_888_217_9);
    let metrics = loss.metrics_on_device(Some(&weights), &logits, &labels)?.1;
    let expected =
        [[lse, 1., 0., p, entropy, lse, 1.], [lse - 1., 1., 1., p, entropy, lse, 1.], [0.; 7]];
    check_rows("literals", DType::F64, &rows_of(&metrics)?, &expected);
    assert_eq!(values(&metrics.accuracy()?.to_device(&CPU)?)?, [0.5]);
    let mean = values(&metrics.mean_nll()?.to_device(&CPU)?)?[0];
    assert!((mean - (lse - 0.5)).abs() < 1e-15, "{mean}");
    Ok(())
}

#[test]
fn rows_with_undefined_softmax_have_nan_metrics() -> Result<()> {
    for num_classes in [3, 40, 300, 20_000] {
        for dtype in dtypes() {
            let mut rows = vec![vec![0.5f64; num_classes]; 5];
            rows[0][num_classes / 2] = NAN;
            rows[1] = vec![-INF; num_classes];
            rows[2] = vec![NAN; num_classes];
            rows[3] = vec![-INF; num_classes];
            rows[3][num_classes - 1] = NAN;
            let logits = Tensor::new(rows, &CPU)?.to_dtype(dtype)?;
            let labels = Tensor::new(&[0u32, 0, 1, 0, 2], &CPU)?;
            for (dim, logits) in [(1, logits.clone()), (0, logits.t()?.contiguous()?)] {
                let step = if num_classes > 10_000 { 6 } else { 1 };
                for options in options(dim, num_classes, &[5])?.iter().step_by(step) {
                    options.check(&format!("{num_classes}"), &logits, dim, &labels)?;
                }
            }
        }
    }
    Ok(())
}

/// The prediction is still the first of the largest logits. The softmax is undefined without a softcap.
#[test]
fn infinite_logits_are_predicted() -> Result<()> {
    for (dtype, num_classes) in
        dtypes().into_iter().flat_map(|dtype| [4, 40, 300].map(|n| (dtype, n)))
    {
        // The first logit that is +inf, one in each row.
        let positions = [0, 1, num_classes / 2, num_classes - 2];
        let mut rows = vec![vec![0.; num_classes]; positions.len()];
        for (row, &position) in rows.iter_mut().zip(&positions) {
            (row[position], row[num_classes - 1]) = (INF, INF);
        }
        let logits = Tensor::new(rows, &CPU)?.to_dtype(dtype)?;
        let labels = Tensor::new(&positions.map(|position| position as u32), &CPU)?;
        for (dim, logits) in [(1, logits.clone()), (0, logits.t()?.contiguous()?)] {
            let loss = LabelSmoothingLoss::new(Smoothing::none()).with_class_dim(dim);
            let metrics = loss.metrics_on_device(None, &logits, &labels)?.1;
            for (row, position) in rows_of(&metrics)?.into_iter().zip(positions) {
                let name = format!("{dtype:?}, {position} of {num_classes}, dimension {dim}");
                let [nll, prediction, correct, confidence, entropy, lse, counted] = row;
                assert_eq!([prediction, correct, counted], [position as f64, 1., 1.], "{name}");
                assert!(!lse.is_finite(), "{name}: {lse}");
                assert!(nll.is_nan() && confidence.is_nan() && entropy.is_nan(), "{name}");
            }
            options(dim, num_classes, &[4])?
                .iter()
                .filter(|options| options.cap.is_some())
                .try_for_each(|options| options.check("capped", &logits, dim, &labels))?;
        }
    }
    Ok(())
}

/// Rows that do not count may hold anything, and their labels too.
#[test]
fn rows_that_do_not_count_are_0_in_every_field() -> Result<()> {
    let logits = Tensor::new(&[[NAN, 0.], [-INF, -INF], [INF, 0.], [0., 1.]], &CPU)?;
    let labels = Tensor::new(&[0i64, -7, 9, 1], &CPU)?;
    let weights = Tensor::new(&[1f32, 1., 0., 0.], &CPU)?;
    let loss = LabelSmoothingLoss::new(Smoothing::none());
    for dtype in dtypes() {
        let logits = logits.to_dtype(dtype)?;
        let ignoring = loss.clone().with_ignore_index(-7);
        let metrics = ignoring.metrics_on_device(Some(&weights), &logits, &labels)?.1;
        assert_eq!(rows_of(&metrics)?[1..], [[0.; 7]; 3], "{dtype:?}");

        // No row counts.
        let none = (&weights * 0.)?;
        let metrics = loss.metrics_on_device(Some(&none), &logits, &labels)?.1;
        assert_eq!(rows_of(&metrics)?, [[0.; 7]; 4], "{dtype:?}");
        check_means("no row counts", dtype, &metrics, &[])?;
    }
    Ok(())
}

/// A class weight of 0 changes the loss alone.
#[test]
fn labels_of_class_weight_0_count() -> Result<()> {
    let logits = Tensor::new(&[[0f64, 1.], [2., 1.]], &CPU)?;
    let labels = Tensor::new(&[0u32, 0], &CPU)?;
    let plain = LabelSmoothingLoss::new(Smoothing::none());
    let weighted = plain.clone().with_class_weights(&Tensor::new(&[0f32, 1.], &CPU)?)?;
    let expected = rows_of(&plain.metrics_on_device(None, &logits, &labels)?.1)?;
    assert_eq!(rows_of(&weighted.metrics_on_device(None, &logits, &labels)?.1)?, expected);
    assert!(expected.iter().all(|row| row[6] == 1.));
    Ok(())
}

#[test]
fn metrics_of_empty_batches() -> Result<()> {
    for (dims, rows) in [(&[0, 3][..], &[0][..]), (&[2, 0, 3], &[2, 0])] {
        for dtype in dtypes() {
            let logits = Tensor::zeros(dims, dtype, &CPU)?;
            let labels = Tensor::zeros(rows, DType::U32, &CPU)?;
            let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
            let metrics = loss.metrics_on_device(None, &logits, &labels)?.1;
            assert_eq!((metrics.nll.dims(), metrics.prediction.dims()), (rows, rows));
            check_means("empty", dtype, &metrics, &[])?;
        }
    }
    Ok(())
}

#[test]
fn loss_and_gradient_are_those_of_forward() -> Result<()> {
    let cases = [grid(&[5, 7], 1)?, grid(&[2, 300], 1)?, grid(&[2, 5, 3], 1)?, grid(&[4], 0)?];
    for case in fewer_where_slow(cases.concat()) {
        if case.targets.dtype().is_float() {
            continue;
        }
        for dtype in dtypes() {
            let (loss, gradient) = case.run(dtype)?;
            let logits = Var::from_tensor(&case.logits.to_dtype(dtype)?)?;
            let weights = case.row_weights.as_ref();
            let (with_metrics, _) = case.loss.metrics_on_device(weights, &logits, &case.targets)?;
            let gradients = sum_with_grad_output(&with_metrics)?.backward()?;
            let actual = gradients.get(&logits).expect("no gradient");
            let (expected, bits) = (values(&loss)?, values(&with_metrics)?);
            let is_nan = |values: &[f64]| values.iter().all(|value| value.is_nan());
            if !(is_nan(&expected) && is_nan(&bits)) {
                assert_same(&case.name, loss.dtype(), &bits, &expected);
            }
            assert_same(&case.name, dtype, &values(actual)?, &values(&gradient)?);
        }
    }
    Ok(())
}

#[test]
fn metrics_have_the_shape_of_the_rows_and_no_graph() -> Result<()> {
    for (dims, dim, rows) in
        [(&[5][..], 0, &[][..]), (&[4, 5], 1, &[4]), (&[2, 5, 3, 4], 1, &[2, 3, 4])]
    {
        for dtype in dtypes() {
            let logits = Var::from_tensor(&random(dims, 1., 1)?.to_dtype(dtype)?)?;
            let labels = random_labels(rows, 5, 2)?;
            let loss = LabelSmoothingLoss::new(Smoothing::none()).with_class_dim(dim);
            let (loss, metrics) = loss.metrics_on_device(None, &logits, &labels)?;
            assert!(loss.track_op());
            let Metrics { nll, prediction, correct, confidence, entropy, lse, counted, .. } =
                &metrics;
            assert_eq!((prediction.dims(), prediction.dtype()), (rows, DType::U32));
            for field in [nll, correct, confidence, entropy, lse, counted] {
                assert_eq!((field.dims(), field.dtype()), (rows, loss.dtype()), "{dtype:?}");
                assert!(!field.track_op() && field.device().same_device(prediction.device()));
            }
            assert!(!prediction.track_op() && !metrics.mean_nll()?.track_op());
            if dtype == DType::F32 {
                assert!(nll.device().same_device(common::device()));
            }
        }
    }
    Ok(())
}

// ---- With a linear layer

fn logits_of(hidden: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let logits = hidden.broadcast_matmul(&weight.t()?)?;
    bias.map_or(Ok(logits.clone()), |bias| logits.broadcast_add(bias))
}

#[test]
fn forward_linear_has_the_metrics_of_forward() -> Result<()> {
    let tiles = [(100, 100), (100, 4), (4, 100), (3, 5), (1, 1), (2, 10), (7, 40)];
    for (rows, num_classes) in [(&[2, 3][..], 11), (&[7], 3), (&[5], 90)] {
        let hidden = on_device(&random(&[rows, &[4]].concat(), 1., 11)?)?;
        let weight = on_device(&random(&[num_classes, 4], 1., 12)?)?;
        let bias = on_device(&random(&[num_classes], 1., 13)?)?;
        let labels = random_labels(rows, num_classes, 2)?;
        for options in options(rows.len(), num_classes, rows)? {
            for (tile_rows, classes) in tiles {
                for bias in [None, Some(&bias)] {
                    let name = format!(
                        "{}, {rows:?} {num_classes}, {tile_rows} x {classes}",
                        options.name
                    );
                    let logits = logits_of(&hidden, &weight, bias)?.to_device(&CPU)?;
                    let expected = options.expected(&logits, rows.len(), &labels)?;
                    let device = hidden.device();
                    let loss = match &options.row_weights {
                        Some(weights) => options.loss.weigh_rows(&weights.to_device(device)?)?,
                        None => options.loss.clone(),
                    };
                    let labels = labels.to_device(device)?;
                    let tile = TileSize { rows: tile_rows, classes };
                    let (tiled, metrics) = testing::forward_linear_tiled_with_metrics(
                        &loss, &hidden, &weight, bias, &labels, tile,
                    )?;
                    check_rows(&name, DType::F64, &rows_of(&metrics)?, &expected);
                    check_means(&name, DType::F64, &metrics, &expected)?;
                    assert_eq!(metrics.nll.dims(), rows);
                    let plain = testing::forward_linear_tiled(
                        &loss, &hidden, &weight, bias, &labels, tile,
                    )?;
                    let [tiled, plain] = [tiled, plain].map(|loss| values(&loss.to_device(&CPU)?));
                    assert_same(&name, DType::F64, &tiled?, &plain?);
                }
            }
        }
    }
    Ok(())
}

/// All logits of a row are equal, or the masked label and the prediction are in different tiles.
#[test]
fn tiles_keep_the_first_of_equal_logits_and_the_label() -> Result<()> {
    let hidden = on_device(&Tensor::ones((3, 1), DType::F64, &CPU)?)?;
    let labels = on_device(&Tensor::new(&[0u32, 8, 5], &CPU)?)?;
    let loss = LabelSmoothingLoss::new(Smoothing::none());
    for column in
        [[1.; 9], [0., 3., 0., 0., 3., 0., 0., 3., 0.], [-INF, -1., 0., 0., 0., 0., -INF, 0., -INF]]
    {
        let weight = on_device(&Tensor::new(&column, &CPU)?.unsqueeze(1)?)?;
        let expected: Vec<Row> = [0, 8, 5].map(|label| expected_row(&column, label)).to_vec();
        for classes in [1, 2, 3, 4, 8, 9] {
            let tile = TileSize { rows: 2, classes };
            let metrics = testing::forward_linear_tiled_with_metrics(
                &loss, &hidden, &weight, None, &labels, tile,
            )?
            .1;
            check_rows(&format!("{classes}"), DType::F64, &rows_of(&metrics)?, &expected);
        }
    }
    Ok(())
}

#[test]
fn default_tiles_have_the_metrics_of_forward() -> Result<()> {
    for dtype in dtypes() {
        let hidden = on_device(&random(&[2, 20, 8], 1., 11)?.to_dtype(dtype)?)?;
        let weight = on_device(&random(&[50, 8], 1., 12)?.to_dtype(dtype)?)?;
        let bias = on_device(&random(&[50], 1., 13)?.to_dtype(dtype)?)?;
        let hidden = Var::from_tensor(&hidden)?;
        let labels = random_labels(&[2, 20], 50, 2)?.to_device(hidden.device())?;
        let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_ignore_index(3);
        let (result, metrics) =
            loss.forward_linear_with_metrics(&hidden, &weight, Some(&bias), &labels)?;
        assert_eq!((metrics.nll.dims(), metrics.nll.dtype()), (&[2, 20][..], result.dtype()));
        assert!(result.track_op() && !metrics.nll.track_op());
        if dtype == DType::F64 {
            let logits = logits_of(&hidden, &weight, Some(&bias))?;
            let expected = rows_of(&loss.forward_with_metrics(&logits, &labels)?.1)?;
            check_rows("default tiles", dtype, &rows_of(&metrics)?, &expected);
        }
    }
    Ok(())
}

/// Logits masked with the dtype's minimum do not overflow the sums of the entropy and of `over_unmasked`.
#[test]
fn logits_masked_with_the_lowest_number() -> Result<()> {
    for num_classes in [8, 40, 600] {
        for dtype in dtypes() {
            let lowest = if dtype == DType::F64 { f64::MIN } else { f64::from(f32::MIN) };
            if matches!(dtype, DType::F16 | DType::BF16) {
                continue;
            }
            let mut row = vec![lowest; num_classes];
            row[num_classes - 2..].fill(0.);
            for (dims, class_dim) in [([1, num_classes], 1), ([num_classes, 1], 0)] {
                let logits = Tensor::from_vec(row.clone(), &dims, &CPU)?.to_dtype(dtype)?;
                let labels = Tensor::new(&[num_classes as u32 - 1], &CPU)?;
                let of = |smoothing| -> Result<_> {
                    let loss = LabelSmoothingLoss::new(smoothing).with_class_dim(class_dim);
                    let (loss, metrics) = loss.metrics_on_device(None, &logits, &labels)?;
                    Ok((values(&loss)?[0], values(&metrics.entropy)?[0]))
                };
                let (all, entropy) = of(Smoothing::over_all(0.1)?)?;
                let (unmasked, _) = of(Smoothing::over_unmasked(0.1)?)?;
                let name = format!("{dtype:?} {dims:?}");
                assert!((entropy - 2f64.ln()).abs() < 1e-6, "{name}: entropy {entropy}");
                assert!((unmasked / all - 1.).abs() < 1e-5, "{name}: {unmasked}, {all}");
            }
        }
    }
    Ok(())
}

/// The lowest number is no mask: the first of logits that all have it is predicted.
#[test]
fn logits_that_are_all_the_lowest_number() -> Result<()> {
    let labels = Tensor::new(&[0u32], &CPU)?;
    for num_classes in [3, 40, 600] {
        for (dims, class_dim) in [([1, num_classes], 1), ([num_classes, 1], 0)] {
            let logits = Tensor::full(f32::MIN, &dims, &CPU)?;
            let loss = LabelSmoothingLoss::new(Smoothing::none()).with_class_dim(class_dim);
            let (_, metrics) = loss.metrics_on_device(None, &logits, &labels)?;
            assert_eq!(
                (values(&metrics.prediction)?, values(&metrics.correct)?),
                (vec![0.], vec![1.])
            );
            let entropy = values(&metrics.entropy)?[0];
            assert!((entropy - (num_classes as f64).ln()).abs() < 1e-5, "{dims:?}: {entropy}");
        }
    }
    Ok(())
}

/// A NaN beside +inf hides which logit is the largest.
#[test]
fn a_row_with_nan_and_infinity_has_no_prediction() -> Result<()> {
    for num_classes in [3, 40, 300] {
        for nan_at in [0, num_classes - 1] {
            let mut row = vec![0f32; num_classes];
            (row[1], row[nan_at]) = (f32::INFINITY, f32::NAN);
            let logits = Tensor::from_vec(row.clone(), (1, num_classes), &CPU)?;
            let labels = Tensor::new(&[1u32], &CPU)?;
            let loss = LabelSmoothingLoss::new(Smoothing::none());
            let (_, metrics) = loss.metrics_on_device(None, &logits, &labels)?;
            assert_eq!(
                (values(&metrics.prediction)?, values(&metrics.correct)?),
                (vec![0.], vec![0.])
            );
            row[nan_at] = 0.;
            let logits = Tensor::from_vec(row, (1, num_classes), &CPU)?;
            let (_, metrics) = loss.metrics_on_device(None, &logits, &labels)?;
            assert_eq!(
                (values(&metrics.prediction)?, values(&metrics.correct)?),
                (vec![1.], vec![1.])
            );
        }
    }
    Ok(())
}
