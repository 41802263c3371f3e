//! `forward_linear` against a matrix multiplication followed by `forward`.

mod common;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_label_smoothing::testing::{self, TileSize};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Shard, Smoothing};
use common::{
    CPU, fewer_where_slow, grid, on_device, random, random_labels, random_probabilities,
    sum_with_grad_output, values,
};

/// A loss as a function of hidden states, weight and bias.
type Forward<'a> = &'a dyn Fn(&Tensor, &Tensor, Option<&Tensor>) -> Result<Tensor>;

/// Hidden states and the weight and bias of a linear layer, all f64 on the CPU.
#[derive(Clone)]
struct Inputs {
    hidden: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Inputs {
    /// `rows` are the dimensions of the hidden states but the last.
    fn new(rows: &[usize], hidden_size: usize, num_classes: usize, bias: bool) -> Result<Self> {
        Ok(Self {
            hidden: random(&[rows, &[hidden_size]].concat(), 1., 11)?,
            weight: random(&[num_classes, hidden_size], 1., 12)?,
            bias: bias.then(|| random(&[num_classes], 1., 13)).transpose()?,
        })
    }

    fn vars(&self, dtype: DType) -> Result<[Option<Var>; 3]> {
        let var = |tensor: &Tensor| Var::from_tensor(&on_device(&tensor.to_dtype(dtype)?)?);
        let bias = self.bias.as_ref().map(var).transpose()?;
        Ok([Some(var(&self.hidden)?), Some(var(&self.weight)?), bias])
    }

    /// The loss by `forward`, and the gradients of Σ grad_output·loss.
    fn run(
        &self,
        dtype: DType,
        forward: impl Fn(&Tensor, &Tensor, Option<&Tensor>) -> Result<Tensor>,
    ) -> Result<(Vec<f64>, Vec<Vec<f64>>)> {
        let vars = self.vars(dtype)?;
        let [hidden, weight, bias] = vars.each_ref().map(|var| var.as_ref().map(Var::as_tensor));
        let (hidden, weight) = (hidden.expect("hidden"), weight.expect("weight"));
        let loss = forward(hidden, weight, bias)?;
        let gradients = sum_with_grad_output(&loss)?.backward()?;
        let gradients = vars.iter().flatten().map(|var| {
            let gradient = gradients.get(var).expect("no gradient arrived");
            assert_eq!((gradient.dims(), gradient.dtype()), (var.dims(), dtype));
            values(gradient)
        });
        Ok((values(&loss)?, gradients.collect::<Result<_>>()?))
    }

    fn run_full_logits(
        &self,
        loss: &LabelSmoothingLoss,
        targets: &Tensor,
    ) -> Result<(Vec<f64>, Vec<Vec<f64>>)> {
        self.run(DType::F64, |hidden, weight, bias| {
            let targets = targets.to_device(hidden.device())?;
            Ok(loss.forward(&logits(hidden, weight, bias)?, &targets)?)
        })
    }

    fn run_tiled(
        &self,
        dtype: DType,
        loss: &LabelSmoothingLoss,
        targets: &Tensor,
        tile: TileSize,
    ) -> Result<(Vec<f64>, Vec<Vec<f64>>)> {
        self.run_within_budget(dtype, loss, targets, tile, 0)
    }

    fn run_within_budget(
        &self,
        dtype: DType,
        loss: &LabelSmoothingLoss,
        targets: &Tensor,
        tile: TileSize,
        budget: usize,
    ) -> Result<(Vec<f64>, Vec<Vec<f64>>)> {
        self.run(dtype, |hidden, weight, bias| {
            let targets = targets.to_device(hidden.device())?;
            Ok(testing::forward_linear_tiled_within_budget(
                loss, hidden, weight, bias, &targets, tile, budget,
            )?)
        })
    }
}

fn logits(hidden: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (rows, size) = hidden.dims().split_at(hidden.rank() - 1);
    let flat = hidden.reshape((rows.iter().product::<usize>(), size[0]))?;
    let logits = flat.matmul(&weight.t()?)?.reshape([rows, &weight.dims()[..1]].concat())?;
    match bias {
        Some(bias) => logits.broadcast_add(bias),
        None => Ok(logits),
    }
}

fn assert_close(name: &str, actual: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len(), "{name}");
    for (i, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let error = (actual - expected).abs();
        assert!(
            error <= tolerance * expected.abs().max(1.),
            "{name}, {i}: {actual}, expected {expected}"
        );
    }
}

fn assert_all_close(
    name: &str,
    actual: &(Vec<f64>, Vec<Vec<f64>>),
    expected: &(Vec<f64>, Vec<Vec<f64>>),
    tolerance: f64,
) {
    assert_close(&format!("{name}: loss"), &actual.0, &expected.0, tolerance);
    assert_eq!(actual.1.len(), expected.1.len());
    for (i, (actual, expected)) in actual.1.iter().zip(&expected.1).enumerate() {
        assert_close(&format!("{name}: gradient {i}"), actual, expected, tolerance);
    }
}

/// The tiles divide the classes and the rows in several ways. All logits are kept, or none.
#[test]
fn every_combination_of_options_matches_forward() -> Result<()> {
    let tiles = [(100, 100), (100, 4), (4, 100), (3, 5), (1, 1), (2, 10)];
    for (rows, classes) in [(&[2, 3][..], 11), (&[7], 3), (&[2, 1, 3], 40)] {
        let dims = [rows, &[classes]].concat();
        for (i, case) in fewer_where_slow(grid(&dims, rows.len())?).enumerate() {
            let inputs = Inputs::new(rows, 5, classes, i % 2 == 0)?;
            let loss = case.loss_on(on_device(&inputs.hidden)?.device())?;
            let expected = inputs.run_full_logits(&loss, &case.targets)?;
            let (rows, classes) = tiles[i % tiles.len()];
            let tile = TileSize { rows, classes };
            let budget = [0, usize::MAX][i / tiles.len() % 2];
            let actual =
                inputs.run_within_budget(DType::F64, &loss, &case.targets, tile, budget)?;
            let name = format!("{}, tiles of {rows} x {classes}, budget {budget}", case.name);
            assert_all_close(&name, &actual, &expected, 1e-12);
        }
    }
    Ok(())
}

/// Without a budget, `forward_linear` divides rows and classes of these sizes.
#[test]
fn default_tiles_match_forward() -> Result<()> {
    if cfg!(emulator) {
        // The emulated threads are too slow for these sizes.
        return Ok(());
    }
    let inputs = Inputs::new(&[3, 1400], 3, 1100, true)?;
    let targets = random_labels(&[3, 1400], 1100, 2)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_others(0.1)?)
        .with_ignore_index(7)
        .with_class_weights(&random(&[1100], 1., 4)?.abs()?)?
        .with_z_loss(1e-3)?;
    let expected = inputs.run_full_logits(&loss, &targets)?;
    // Without a budget, with one for some of the rows, and with the default, which keeps all.
    for loss in [
        loss.clone().with_logits_budget(0),
        loss.clone().with_logits_budget(500 * 1100 * size_of::<f64>()),
        loss,
    ] {
        let actual = inputs.run(DType::F64, |hidden, weight, bias| {
            let targets = targets.to_device(hidden.device())?;
            Ok(loss.forward_linear(hidden, weight, bias, &targets)?)
        })?;
        assert_all_close("4200 x 1100", &actual, &expected, 1e-11);
    }
    Ok(())
}

/// A budget for all rows, for some, for too few, and for none. Each gives the results of the same tiles without a budget. A
/// second backward, which has no kept logits, gives the bits of the first.
#[test]
fn every_budget_gives_the_same_gradients() -> Result<()> {
    const ROWS: usize = 200;
    const CLASSES: usize = 40;
    let tile = TileSize { rows: 100, classes: 16 };
    let inputs = Inputs::new(&[2, ROWS / 2], 5, CLASSES, true)?;
    let labels = random_labels(&[2, ROWS / 2], CLASSES, 2)?;
    let probabilities = random_probabilities(&[2, ROWS / 2, CLASSES], 2, 3)?;
    let row_weights = on_device(&random(&[2, ROWS / 2], 1., 4)?.relu()?)?;
    let plain = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_softcap(3.)?;
    let losses = [
        plain.clone().with_reduction(Reduction::None),
        plain.clone().with_ignore_index(7),
        plain.clone().with_z_loss(0.1)?.weigh_rows(&row_weights)?,
        LabelSmoothingLoss::new(Smoothing::over_unmasked(0.1)?).weigh_rows(&row_weights)?,
    ];
    for (i, loss) in losses.iter().enumerate() {
        for targets in [&labels, &probabilities] {
            if i == 1 && targets.dtype().is_float() {
                continue;
            }
            for dtype in [DType::F64, DType::F32] {
                let expected = inputs.run_tiled(dtype, loss, targets, tile)?;
                let row_bytes = CLASSES * dtype.size_in_bytes();
                // The kept rows are a tile of their own, which here has the size of the others or divides the rows alike.
                for budget in [1, 63 * row_bytes, 100 * row_bytes + 5, usize::MAX] {
                    let (losses, gradients) =
                        inputs.run_within_budget(dtype, loss, targets, tile, budget)?;
                    let name = format!("{i} {:?} {dtype:?} {budget}", targets.dtype());
                    let tolerance = if dtype == DType::F64 { 1e-13 } else { 1e-5 };
                    assert_all_close(&name, &(losses, gradients), &expected, tolerance);
                }
            }
        }
    }

    let [hidden, weight, bias] = inputs.vars(DType::F32)?.map(Option::unwrap);
    let labels = on_device(&labels)?;
    for budget in [0, 100 * CLASSES * 4, usize::MAX] {
        let loss = losses[1].clone().with_logits_budget(budget);
        let result = loss.forward_linear(&hidden, &weight, Some(bias.as_tensor()), &labels)?;
        let gradients = || {
            let gradients = (&result * 1.)?.backward()?;
            let of = |var: &Var| values(gradients.get(var).expect("no gradient"));
            Ok::<_, candle_core::Error>([of(&hidden)?, of(&weight)?, of(&bias)?])
        };
        assert_eq!(gradients()?, gradients()?, "budget {budget}");
    }
    Ok(())
}

/// On the CPU the rows that do not count are left out of the multiplications, so even hidden states that are NaN do no harm.
#[test]
fn rows_that_do_not_count_are_not_multiplied() -> Result<()> {
    if cfg!(emulator) || !common::device().is_cpu() {
        // A GPU multiplies all rows.
        return Ok(());
    }
    let (rows, size, classes) = (7, 3, 10);
    let counted = [0usize, 3, 5];
    let inputs = Inputs::new(&[rows], size, classes, true)?;
    let nan = Tensor::full(f64::NAN, (1, size), &CPU)?;
    let hidden: Vec<Tensor> =
        (0..rows)
            .map(|row| {
                if counted.contains(&row) {
                    inputs.hidden.narrow(0, row, 1)
                } else {
                    Ok(nan.clone())
                }
            })
            .collect::<Result<_>>()?;
    let select = |tensor: &Tensor| tensor.index_select(&Tensor::new(&[0u32, 3, 5], &CPU)?, 0);
    let few = Inputs { hidden: select(&inputs.hidden)?, ..inputs.clone() };
    let with_nan = Inputs { hidden: Tensor::cat(&hidden, 0)?, ..inputs };

    let smoothing = Smoothing::over_all(0.1)?;
    let ignoring = LabelSmoothingLoss::new(smoothing.clone()).with_ignore_index(-1);
    let labels = Tensor::new(&[3i64, -1, -1, 0, 9, 2, -1], &CPU)?;
    let label_weights = Tensor::new(&[0.5f32, 1., 2., 1., 0., 3., 0.], &CPU)?;
    let probabilities = random_probabilities(&[rows, classes], 1, 3)?;
    let mask = Tensor::new(&[1u8, 0, 0, 1, 0, 1, 0], &CPU)?;
    let cases = [
        (ignoring, labels, label_weights),
        (LabelSmoothingLoss::new(smoothing), probabilities, mask),
    ];
    let tile = TileSize { rows: 2, classes: 4 };
    for (loss, targets, row_weights) in &cases {
        for reduction in [Reduction::None, Reduction::Sum, Reduction::Mean, Reduction::MeanOrZero] {
            let loss = loss.clone().with_reduction(reduction);
            let expected =
                few.run_full_logits(&loss.weigh_rows(&select(row_weights)?)?, &select(targets)?)?;
            let loss = loss.weigh_rows(row_weights)?;
            for budget in [0, usize::MAX] {
                let (losses, gradients) =
                    with_nan.run_within_budget(DType::F64, &loss, targets, tile, budget)?;
                let name = format!("{:?} {reduction:?}, budget {budget}", targets.dtype());
                let of_counted = |values: &[f64], len: usize| -> Vec<f64> {
                    counted.iter().flat_map(|row| &values[row * len..][..len]).copied().collect()
                };
                assert!(gradients[1..].iter().flatten().all(|g| g.is_finite()), "{name}");
                let others = (0..rows).filter(|row| !counted.contains(row));
                let others = others.flat_map(|row| &gradients[0][row * size..][..size]);
                assert!(others.into_iter().all(|g| *g == 0.), "{name}");
                if reduction == Reduction::None {
                    // The upstream gradients are random and differ, so only the losses can be compared.
                    assert_close(&name, &of_counted(&losses, 1), &expected.0, 1e-12);
                    continue;
                }
                assert_close(&name, &losses, &expected.0, 1e-12);
                assert_close(&name, &of_counted(&gradients[0], size), &expected.1[0], 1e-12);
                assert_close(&name, &gradients[1], &expected.1[1], 1e-12);
                assert_close(&name, &gradients[2], &expected.1[2], 1e-12);
            }
        }
    }
    Ok(())
}

/// No row counts: no multiplication is left.
#[test]
fn a_batch_without_rows_that_count() -> Result<()> {
    let inputs = Inputs::new(&[2, 3], 4, 5, true)?;
    let labels = on_device(&Tensor::full(-1i64, (2, 3), &CPU)?)?;
    for (reduction, expected) in [(Reduction::MeanOrZero, 0.), (Reduction::Sum, 0.)] {
        let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?)
            .with_ignore_index(-1)
            .with_reduction(reduction);
        let [hidden, weight, bias] = inputs.vars(DType::F32)?.map(Option::unwrap);
        let (result, metrics) =
            loss.forward_linear_with_metrics(&hidden, &weight, Some(bias.as_tensor()), &labels)?;
        assert_eq!(values(&result)?, [expected]);
        assert_eq!(values(&metrics.count()?)?, [0.]);
        assert_eq!(metrics.nll.dims(), [2, 3]);
        let gradients = result.backward()?;
        for var in [&hidden, &weight, &bias] {
            let gradient = gradients.get(var).expect("no gradient");
            assert!(values(gradient)?.iter().all(|g| *g == 0.));
            assert_eq!(gradient.dims(), var.dims());
        }
    }
    Ok(())
}

/// Hidden states, weight and bias of several dtypes are computed in f32. Each gets its gradient in its dtype.
#[test]
fn dtypes_of_up_to_32_bits_mix() -> Result<()> {
    let exact = Inputs::new(&[3, 2], 4, 7, true)?;
    let targets = random_labels(&[3, 2], 7, 2)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let (bf16, f16, f32) = (DType::BF16, DType::F16, DType::F32);
    for dtypes in [[bf16, f32, f32], [f32, bf16, f32], [f16, bf16, bf16], [bf16, bf16, f32]] {
        let tensors = [&exact.hidden, &exact.weight, exact.bias.as_ref().expect("a bias")];
        let vars: Vec<Var> = tensors
            .iter()
            .zip(dtypes)
            .map(|(tensor, dtype)| Var::from_tensor(&on_device(&tensor.to_dtype(dtype)?)?))
            .collect::<Result<_>>()?;
        let wide: Vec<Var> =
            vars.iter().map(|var| Var::from_tensor(&var.to_dtype(f32)?)).collect::<Result<_>>()?;
        let targets = on_device(&targets)?;
        for budget in [0, usize::MAX] {
            let loss = loss.clone().with_logits_budget(budget);
            let of = |vars: &[Var]| {
                let bias = Some(vars[2].as_tensor());
                let result = loss.forward_linear(&vars[0], &vars[1], bias, &targets)?;
                let gradients = result.backward()?;
                let gradients = vars.iter().map(|var| {
                    let gradient = gradients.get(var).expect("no gradient");
                    assert_eq!(gradient.dtype(), var.dtype());
                    Ok::<_, candle_core::Error>(gradient.clone())
                });
                Ok::<_, candle_core::Error>((result, gradients.collect::<Result<Vec<_>>>()?))
            };
            let (actual, expected) = (of(&vars)?, of(&wide)?);
            assert_eq!(actual.0.dtype(), f32);
            assert_eq!(values(&actual.0)?, values(&expected.0)?);
            for (actual, expected) in actual.1.iter().zip(&expected.1) {
                assert_eq!(values(actual)?, values(&expected.to_dtype(actual.dtype())?)?);
            }
        }
    }
    Ok(())
}

/// Tiles with long rows are shared between threads or groups of threads.
#[test]
fn long_rows_match_forward() -> Result<()> {
    let inputs = Inputs::new(&[2], 2, 40_000, true)?;
    let labels = Tensor::new(&[39_999u32, 3], &CPU)?;
    let probabilities = random_probabilities(&[2, 40_000], 1, 3)?;
    let plain = LabelSmoothingLoss::new(Smoothing::over_all(0.2)?)
        .with_reduction(Reduction::None)
        .with_z_loss(0.01)?;
    let weighted = plain.clone().with_class_weights(&random(&[40_000], 1., 4)?.abs()?)?;
    for targets in [labels, probabilities] {
        for loss in [&plain, &weighted] {
            let expected = inputs.run_full_logits(loss, &targets)?;
            for classes in [40_000, 39_000, 17_000] {
                let actual =
                    inputs.run_tiled(DType::F64, loss, &targets, TileSize { rows: 9, classes })?;
                assert_all_close(&format!("{classes} at a time"), &actual, &expected, 1e-11);
            }
        }
    }
    Ok(())
}

/// Transposed, narrowed and broadcast views.
#[test]
fn views_match_forward() -> Result<()> {
    let (rows, size, classes) = ([4, 3], 6, 9);
    let tile = TileSize { rows: 5, classes: 4 };
    let plain = Inputs::new(&rows, size, classes, true)?;
    let views = Inputs {
        hidden: plain.hidden.permute((2, 0, 1))?.contiguous()?.permute((1, 2, 0))?,
        weight: plain.weight.t()?.contiguous()?.t()?,
        bias: plain
            .bias
            .as_ref()
            .map(|b| Tensor::cat(&[b, b], 0)?.narrow(0, classes, classes))
            .transpose()?,
    };
    let same = random(&[1, 1, size], 1., 3)?.broadcast_as((4, 3, size))?;
    let broadcast = Inputs { hidden: same, weight: plain.weight.clone(), bias: None };
    let labels = random_labels(&[3, 4], classes, 2)?.t()?;
    let probabilities = random_probabilities(&[classes, 3, 4], 0, 3)?.permute((2, 1, 0))?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    for targets in [labels, probabilities] {
        for (name, inputs) in [("views", &views), ("broadcast", &broadcast)] {
            // `Var::from_tensor` would make the views contiguous, so the variable is a scale before
            // the view.
            let of = |forward: Forward| {
                let (hidden, weight) = (inputs.hidden.clone(), inputs.weight.clone());
                let scale = Var::new(2f64, &CPU)?;
                let hidden = hidden.broadcast_mul(&scale)?.broadcast_as(hidden.shape())?;
                let loss = forward(&hidden, &weight, inputs.bias.as_ref())?;
                let gradients = loss.backward()?;
                Ok::<_, candle_core::Error>((
                    values(&loss)?,
                    vec![values(gradients.get(&scale).expect("no gradient"))?],
                ))
            };
            let expected = of(&|h, w, b| Ok(loss.forward(&logits(h, w, b)?, &targets)?))?;
            let actual =
                of(&|h, w, b| Ok(testing::forward_linear_tiled(&loss, h, w, b, &targets, tile)?))?;
            assert_all_close(name, &actual, &expected, 1e-12);
        }
    }
    Ok(())
}

/// Neither the layout of the weight nor a gradient changes the tiles, and with them the bits. The weight is larger than a tile.
#[test]
fn views_and_constants_give_the_same_bits() -> Result<()> {
    if cfg!(emulator) {
        // The emulated threads are too slow for this size.
        return Ok(());
    }
    let weight = random(&[15_000, 300], 0.1, 1)?.to_dtype(DType::F32)?;
    let view = on_device(&weight.t()?.contiguous()?)?.t()?;
    let hidden = Var::from_tensor(&on_device(&random(&[3, 300], 1., 2)?.to_dtype(DType::F32)?)?)?;
    let weight = on_device(&weight)?;
    let labels = on_device(&random_labels(&[3], 15_000, 3)?)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let of = |hidden: &Tensor, weight: &Tensor| loss.forward_linear(hidden, weight, None, &labels);
    let (contiguous, of_view) = (of(&hidden, &weight)?, of(&hidden, &view)?);
    assert_eq!(values(&contiguous)?, values(&of_view)?);
    assert_eq!(values(&contiguous)?, values(&of(&hidden.as_detached_tensor(), &weight)?)?);
    let gradient = |loss: &Tensor| values(loss.backward()?.get(&hidden).expect("no gradient"));
    assert_eq!(gradient(&contiguous)?, gradient(&of_view)?);
    Ok(())
}

/// Hidden states of rank 1, and batches without rows.
#[test]
fn single_row_and_empty_batches() -> Result<()> {
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let tile = TileSize { rows: 2, classes: 2 };
    let one = Inputs::new(&[], 4, 5, true)?;
    let target = Tensor::new(3u32, &CPU)?;
    let expected = one.run_full_logits(&loss, &target)?;
    assert_all_close(
        "one row",
        &one.run_tiled(DType::F64, &loss, &target, tile)?,
        &expected,
        1e-12,
    );

    for rows in [&[0][..], &[3, 0], &[0, 2]] {
        let none = Inputs::new(rows, 4, 5, true)?;
        let targets = Tensor::zeros(rows, DType::U32, &CPU)?;
        for (reduction, expected) in [
            (Reduction::Mean, vec![f64::NAN]),
            (Reduction::Sum, vec![0.]),
            (Reduction::None, vec![]),
        ] {
            let loss = loss.clone().with_reduction(reduction);
            let [hidden, weight, bias] = none.vars(DType::F64)?.map(Option::unwrap);
            let result = loss.forward_linear(&hidden, &weight, Some(bias.as_tensor()), &targets)?;
            assert_eq!(format!("{:?}", values(&result)?), format!("{expected:?}"));
            let gradients = result.sum_all()?.backward()?;
            for var in [&hidden, &weight, &bias] {
                let gradient = gradients.get(var).expect("no gradient");
                assert!(values(gradient)?.iter().all(|g| *g == 0.), "{rows:?} {reduction:?}");
            }
        }
    }
    Ok(())
}

/// An empty view may begin beyond the end of its storage, where candle's conversions panic.
#[test]
fn hidden_states_and_weights_that_are_empty_views() -> Result<()> {
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_reduction(Reduction::Sum);
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        let empty = |len| Tensor::zeros((0, 6), dtype, &CPU)?.narrow(1, 2, len);
        // No rows.
        let weight = Var::from_tensor(&random(&[3, 4], 1., 1)?.to_dtype(dtype)?)?;
        let no_targets = Tensor::zeros(0, DType::U32, &CPU)?;
        let result = loss.forward_linear(&empty(4)?, &weight, None, &no_targets)?;
        assert_eq!(values(&result)?, [0.]);
        let gradients = result.backward()?;
        assert_eq!(values(gradients.get(&weight).expect("no gradient"))?, [0.; 12]);
        // A hidden size of 0, which makes three logits of 0.
        let hidden = Tensor::zeros((1, 0), dtype, &CPU)?;
        let target = Tensor::zeros(1, DType::U32, &CPU)?;
        let result = loss.forward_linear(&hidden, &empty(3)?.t()?, None, &target)?;
        assert!((values(&result)?[0] - 3f64.ln()).abs() < 1e-6);
        // A process without classes.
        let hidden = random(&[1, 4], 1., 1)?.to_dtype(dtype)?;
        let shard = Shard { first_class: 0, num_classes: 3 };
        let gather = |states: &Tensor| states.unsqueeze(0);
        loss.forward_linear_shard(&hidden, &empty(4)?, None, &target, shard, gather)?;
    }
    Ok(())
}

/// With a hidden size of 0, the logits are the bias.
#[test]
fn zero_hidden_size_uses_the_bias_alone() -> Result<()> {
    let inputs = Inputs::new(&[3], 0, 4, true)?;
    let targets = Tensor::new(&[3u32, 0, 1], &CPU)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let expected = inputs.run_full_logits(&loss, &targets)?;
    let actual = inputs.run_tiled(DType::F64, &loss, &targets, TileSize { rows: 2, classes: 3 })?;
    assert_all_close("no hidden units", &actual, &expected, 1e-12);
    Ok(())
}

/// The f64 reference gets the same rounded inputs.
#[test]
fn f32_and_half_types_match_f64() -> Result<()> {
    let exact = Inputs::new(&[6, 5], 16, 37, true)?;
    let targets = random_labels(&[6, 5], 37, 2)?;
    for reduction in [Reduction::Mean, Reduction::None] {
        let loss = LabelSmoothingLoss::new(Smoothing::over_others(0.1)?).with_reduction(reduction);
        for (dtype, ulp) in [
            (DType::F32, 2f64.powi(-23)),
            (DType::F16, 2f64.powi(-10)),
            (DType::BF16, 2f64.powi(-7)),
        ] {
            let round = |tensor: &Tensor| tensor.to_dtype(dtype)?.to_dtype(DType::F64);
            let rounded = Inputs {
                hidden: round(&exact.hidden)?,
                weight: round(&exact.weight)?,
                bias: exact.bias.as_ref().map(round).transpose()?,
            };
            let expected = rounded.run_full_logits(&loss, &targets)?;
            let (losses, gradients) =
                rounded.run_tiled(dtype, &loss, &targets, TileSize { rows: 8, classes: 10 })?;
            // On the CPU the multiplications and the loss run in f32 for these dtypes. On a GPU the
            // logits and their gradient are rounded to the dtype.
            let (absolute, relative) = match common::device() {
                Device::Cpu => (4e-6, 0.51 * ulp),
                _ => (4e-6 + 4. * ulp, 2. * ulp),
            };
            assert_close(&format!("{dtype:?} loss"), &losses, &expected.0, absolute);
            for (actual, expected) in gradients.iter().zip(&expected.1) {
                for (actual, expected) in actual.iter().zip(expected) {
                    let tolerance = absolute + relative * expected.abs();
                    assert!(
                        (actual - expected).abs() <= tolerance,
                        "{dtype:?}: {actual}, expected {expected}"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn only_tracked_inputs_get_gradients() -> Result<()> {
    let inputs = Inputs::new(&[4], 3, 6, true)?;
    let targets = random_labels(&[4], 6, 2)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let expected = inputs.run_full_logits(&loss, &targets)?;
    let plain = [Some(&inputs.hidden), Some(&inputs.weight), inputs.bias.as_ref()];
    let plain = plain.map(|tensor| tensor.expect("all three").clone());
    for tracked in 0..8 {
        let is_tracked = |i: usize| tracked >> i & 1 == 1;
        let vars: Vec<Option<Var>> = (0..3)
            .map(|i| is_tracked(i).then(|| Var::from_tensor(&plain[i])).transpose())
            .collect::<Result<_>>()?;
        let of = |i: usize| vars[i].as_ref().map_or(&plain[i], Var::as_tensor);
        let result = loss.forward_linear(of(0), of(1), Some(of(2)), &targets)?;
        assert_close("loss", &values(&result)?, &expected.0, 1e-12);
        assert_eq!(result.track_op(), tracked != 0);
        // The second pass checks that the graph is still there after the first backward.
        for _ in 0..2 {
            let gradients = (&result * 1.)?.backward()?;
            for i in 0..3 {
                match gradients.get(of(i)) {
                    Some(gradient) => {
                        assert!(is_tracked(i));
                        let mean = sum_with_grad_output(&Tensor::ones((), DType::F64, &CPU)?)?;
                        let scale = mean.to_scalar::<f64>()?;
                        let expected: Vec<f64> = expected.1[i].iter().map(|g| g / scale).collect();
                        assert_close("gradient", &values(gradient)?, &expected, 1e-11);
                    }
                    None => assert!(!is_tracked(i), "{i} of {tracked}"),
                }
            }
        }
    }
    Ok(())
}

/// The hidden states come from an earlier layer, and the weight is used twice (tied embeddings).
#[test]
fn within_a_graph() -> Result<()> {
    let embeddings = Var::from_tensor(&random(&[9, 4], 1., 5)?)?;
    let tokens = random_labels(&[2, 6], 9, 6)?;
    let targets = random_labels(&[2, 6], 9, 7)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let hidden = || -> Result<Tensor> {
        let hidden = embeddings.index_select(&tokens.flatten_all()?, 0)?;
        hidden.reshape((2, 6, 4))?.tanh()
    };
    let actual = loss.forward_linear(&hidden()?, &embeddings, None, &targets)?;
    let expected = loss.forward(&logits(&hidden()?, &embeddings, None)?, &targets)?;
    assert_close("loss", &values(&actual)?, &values(&expected)?, 1e-12);
    let gradient = |loss: &Tensor| values(loss.backward()?.get(&embeddings).expect("no gradient"));
    assert_close("gradient", &gradient(&actual)?, &gradient(&expected)?, 1e-12);
    Ok(())
}

/// An ignored row has zero gradient even if its logits overflow.
#[test]
fn ignored_rows_with_infinite_logits_have_zero_gradient() -> Result<()> {
    let hidden = Tensor::new(&[[1f32, 0.], [f32::MAX, 1.], [0., 1.]], &CPU)?;
    let hidden = Var::from_tensor(&hidden)?;
    let weight = Tensor::new(&[[2f32, 0.], [0., 3.], [-2., 1.]], &CPU)?;
    let targets = Tensor::new(&[0i64, -100, 2], &CPU)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_ignore_index(-100);
    let tile = TileSize { rows: 2, classes: 2 };
    let result = testing::forward_linear_tiled(&loss, &hidden, &weight, None, &targets, tile)?;
    assert!(result.to_scalar::<f32>()?.is_finite());
    let gradients = result.backward()?;
    let gradient = gradients.get(&hidden).expect("no gradient").to_vec2::<f32>()?;
    assert_eq!(gradient[1], [0., 0.]);
    assert!(gradient.iter().flatten().all(|g| g.is_finite()));
    Ok(())
}

/// A power of two scales the gradients exactly.
#[test]
fn gradients_are_proportional_to_grad_output() -> Result<()> {
    let inputs = Inputs::new(&[5], 3, 8, false)?;
    let targets = random_labels(&[5], 8, 2)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let tile = TileSize { rows: 2, classes: 3 };
    let of = |scale: f64| {
        inputs.run(DType::F64, |h, w, b| {
            let targets = targets.to_device(h.device())?;
            testing::forward_linear_tiled(&loss, h, w, b, &targets, tile)? * scale
        })
    };
    let (one, large) = (of(1.)?, of(1024.)?);
    for (one, large) in one.1.iter().zip(&large.1) {
        for (one, large) in one.iter().zip(large) {
            assert_eq!(one * 1024., *large);
        }
    }
    Ok(())
}

#[test]
fn errors_contain_the_given_shapes_and_dtypes() -> Result<()> {
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let of = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu);
    let targets = Tensor::zeros(4, DType::U32, &CPU)?;
    let (hidden, weight, bias) = (of(&[4, 3])?, of(&[7, 3])?, of(&[7])?);
    let message = |result: candle_label_smoothing::Result<Tensor>| match result {
        Ok(_) => panic!("no error"),
        Err(error) => error.to_string(),
    };
    let shapes = "expected [.., H], [K, H] and [K] (or no bias)";
    for (hidden, weight, bias) in [
        (of(&[4, 3])?, of(&[3, 7])?, None),
        (of(&[4, 3])?, of(&[7, 3])?, Some(of(&[3])?)),
        (of(&[4, 3])?, of(&[7, 3])?, Some(of(&[7, 1])?)),
        (of(&[4, 3])?, of(&[3])?, None),
        (of(&[])?, of(&[7, 3])?, None),
        (of(&[4, 3])?, of(&[1, 7, 3])?, None),
    ] {
        let message = message(loss.forward_linear(&hidden, &weight, bias.as_ref(), &targets));
        assert!(message.contains(shapes), "{message}");
        assert!(message.contains(&format!("{:?}", hidden.dims())), "{message}");
        assert!(message.contains(&format!("{:?}", weight.dims())), "{message}");
    }
    let double = weight.to_dtype(DType::F64)?;
    let text = message(loss.forward_linear(&hidden, &double, Some(&bias), &targets));
    assert!(text.contains("F32") && text.contains("F64"), "{text}");
    let ints = hidden.to_dtype(DType::U32)?;
    let text = message(loss.forward_linear(&ints, &weight.to_dtype(DType::U32)?, None, &targets));
    assert!(text.contains("hidden states have dtype U32"), "{text}");
    let text =
        message(loss.clone().with_class_dim(9).forward_linear(&hidden, &weight, None, &targets));
    assert!(text.contains("[4, 7]"), "{text}");
    let images = loss.clone().with_class_dim(0);
    let text = message(images.forward_linear(&hidden, &weight, None, &targets));
    assert!(text.contains("class dimension is 0") && text.contains("last dimension, 1"), "{text}");
    loss.clone().with_class_dim(1).forward_linear(&hidden, &weight, Some(&bias), &targets)?;
    let text = message(loss.forward_linear(&hidden, &of(&[0, 3])?, None, &targets));
    assert!(text.contains("no classes"), "{text}");
    let short = targets.narrow(0, 0, 3)?;
    let text = message(loss.forward_linear(&hidden, &weight, None, &short));
    assert!(text.contains("[3]") && text.contains("[4]"), "{text}");
    Ok(())
}

/// The view has more rows than memory has room for row results.
#[test]
#[cfg(target_pointer_width = "64")]
fn more_rows_than_memory_holds_is_an_error() -> Result<()> {
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let weight = Tensor::zeros((1, 1), DType::F32, &CPU)?;
    for rows in [1usize << 50, 1 << 62] {
        let hidden = Tensor::zeros((1, 1), DType::F32, &CPU)?.broadcast_as((rows, 1))?;
        let targets = Tensor::zeros(1, DType::U32, &CPU)?.broadcast_as(rows)?;
        let error = loss.forward_linear(&hidden, &weight, None, &targets).expect_err("no error");
        assert!(error.to_string().contains("too large for memory"), "{error}");
    }
    Ok(())
}

/// The error counts the row among all rows, not within its tile. A GPU sets the row to NaN instead.
#[test]
fn target_out_of_range_is_reported_with_its_row() -> Result<()> {
    let inputs = Inputs::new(&[2, 3], 3, 4, false)?;
    let targets = Tensor::new(&[[0i64, 1, 2], [3, 4, 0]], &CPU)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_reduction(Reduction::None);
    let tile = TileSize { rows: 1, classes: 3 };
    let (hidden, weight) = (&inputs.hidden, &inputs.weight);
    let result = testing::forward_linear_tiled(&loss, hidden, weight, None, &targets, tile);
    if cfg!(emulator) {
        let is_nan: Vec<bool> = values(&result?)?.iter().map(|loss| loss.is_nan()).collect();
        assert_eq!(is_nan, [false, false, false, false, true, false]);
    } else {
        let text = result.expect_err("no error").to_string();
        assert!(text.contains("target 4 of row 4"), "{text}");
    }
    Ok(())
}

#[test]
fn number_of_threads_changes_no_bit() -> Result<()> {
    if cfg!(any(emulator, target_family = "wasm")) {
        return Ok(());
    }
    let inputs = Inputs::new(&[70], 8, 3000, true)?;
    let targets = random_labels(&[70], 3000, 2)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let tile = TileSize { rows: 64, classes: 2000 };
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.expect("a pool").install(|| {
            let kept = inputs.run_within_budget(DType::F32, &loss, &targets, tile, usize::MAX)?;
            Ok::<_, candle_core::Error>((
                inputs.run_tiled(DType::F32, &loss, &targets, tile)?,
                kept,
            ))
        })
    };
    let one = run(1)?;
    for threads in [2, 5] {
        assert_eq!(run(threads)?, one, "{threads} threads");
    }
    Ok(())
}

/// candle's linear layer keeps its weight as (K, H), the shape that `forward_linear` takes.
#[test]
fn parameters_of_candle_nn_linear_can_be_used() -> Result<()> {
    use candle_nn::Module;
    let inputs = Inputs::new(&[2, 3], 4, 5, true)?;
    let targets = random_labels(&[2, 3], 5, 2)?;
    let layer = candle_nn::Linear::new(inputs.weight.clone(), inputs.bias.clone());
    let loss = LabelSmoothingLoss::new(Smoothing::over_others(0.1)?);
    let expected = loss.forward(&layer.forward(&inputs.hidden)?, &targets)?;
    assert_eq!(inputs.hidden.dim(D::Minus1)?, 4);
    let actual = loss.forward_linear(&inputs.hidden, layer.weight(), layer.bias(), &targets)?;
    assert_close("loss", &values(&actual)?, &values(&expected)?, 1e-12);
    Ok(())
}
