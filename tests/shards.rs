//! The loss over a vocabulary that is split between processes, against one process. Threads stand for the processes.

mod common;

use candle_core::{DType, Result, Tensor, Var, bail};
use candle_label_smoothing::testing::{self, TileSize};
use candle_label_smoothing::{
    Error, LabelSmoothingLoss, Reduction, Shard, Smoothing, check_shards,
};
use common::compare::{assert_close, first_difference, roundings};
use common::processes::{Process, part, run, shard, targets_of};
use common::{
    CPU, Case, device, dtypes, fewer_where_slow, grid, on_device, random, random_labels,
    random_probabilities, sum_with_grad_output, values,
};
use std::cell::Cell;

/// The numbers of classes of 1, 2, 3 and 5 processes, of 7 classes in all. One has none.
const SPLITS: [&[usize]; 4] = [&[7], &[5, 2], &[1, 4, 2], &[2, 0, 1, 3, 1]];

/// The loss of each process, and the gradient of all its logits.
fn run_sharded(
    case: &Case,
    class_dim: usize,
    dtype: DType,
    split: &[usize],
) -> Result<(Vec<Vec<f64>>, Tensor)> {
    let results = run(split.len(), |process| -> Result<(Vec<f64>, Tensor)> {
        let logits = part(&case.logits.to_dtype(dtype)?, class_dim, split, process.rank)?;
        let logits = Var::from_tensor(&on_device(&logits)?)?;
        let targets = targets_of(&case.targets, class_dim, split, process.rank)?;
        let loss = case.loss_on(device())?;
        let shard = shard(split, process.rank);
        let loss = loss.forward_shard(&logits, &targets, shard, |t| process.gather(t))?;
        assert_eq!(process.num_exchanges.get(), 1);
        let gradients = sum_with_grad_output(&loss)?.backward()?;
        let gradient = gradients.get(&logits).expect("no gradient reached the logits");
        assert_eq!((gradient.dims(), gradient.dtype()), (logits.dims(), dtype));
        Ok((values(&loss)?, gradient.to_device(&CPU)?))
    });
    let (losses, gradients): (Vec<_>, Vec<_>) =
        results.into_iter().collect::<Result<Vec<_>>>()?.into_iter().unzip();
    Ok((losses, Tensor::cat(&gradients, class_dim)?))
}

fn assert_same_bits(name: &str, losses: &[Vec<f64>]) {
    let bits = |losses: &Vec<f64>| losses.iter().map(|loss| loss.to_bits()).collect::<Vec<_>>();
    for loss in losses {
        assert_eq!(bits(loss), bits(&losses[0]), "{name}: the processes have other losses");
    }
}

/// Compares the loss and the gradient with those of one process in f64.
fn check(case: &Case, class_dim: usize, dtype: DType, splits: &[&[usize]]) -> Result<()> {
    let logits = case.logits.to_dtype(dtype)?.to_dtype(DType::F64)?;
    let (expected_loss, expected_gradient) = Case { logits, ..case.clone() }.run(DType::F64)?;
    let (expected_loss, expected_gradient) = (values(&expected_loss)?, values(&expected_gradient)?);
    let (roundings, half_ulp) = roundings(dtype);
    for split in splits {
        let name = format!("{}, {dtype:?}, {split:?}", case.name);
        let (losses, gradient) = run_sharded(case, class_dim, dtype, split)?;
        assert_same_bits(&name, &losses);
        assert_close(&name, &losses[0], &expected_loss, roundings, roundings);
        assert_close(&name, &values(&gradient)?, &expected_gradient, roundings, half_ulp);
    }
    Ok(())
}

#[test]
fn all_options_agree_with_one_process() -> Result<()> {
    for case in fewer_where_slow(grid(&[4, 7], 1)?) {
        check(&case, 1, dtypes()[0], &SPLITS)?;
    }
    Ok(())
}

#[test]
fn every_dtype_and_layout_agrees_with_one_process() -> Result<()> {
    for (dims, class_dim) in [(&[7][..], 0), (&[2, 7, 3], 1)] {
        for case in grid(dims, class_dim)?.into_iter().step_by(53) {
            for dtype in dtypes() {
                check(&case, class_dim, dtype, &SPLITS[2..])?;
            }
        }
    }
    Ok(())
}

#[test]
fn no_rows_agree_with_one_process() -> Result<()> {
    for reduction in [Reduction::None, Reduction::Sum, Reduction::Mean, Reduction::MeanOrZero] {
        let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_reduction(reduction);
        let (name, row_weights) = (format!("no rows, {reduction:?}"), None);
        let logits = Tensor::zeros((0, 7), DType::F64, &CPU)?;
        let targets = Tensor::zeros(0, DType::I64, &CPU)?;
        let case = Case { name, loss, row_weights, logits, targets };
        check(&case, 1, dtypes()[0], &SPLITS)?;
    }
    Ok(())
}

/// NaN of rows that do not count is no failure of a process.
#[test]
fn rows_that_do_not_count_may_be_nan() -> Result<()> {
    let nan = |tensor: &Tensor| -> Result<Tensor> {
        let nan = Tensor::full(f64::NAN, (1, tensor.dim(1)?), &CPU)?;
        Tensor::cat(&[&nan, &tensor.narrow(0, 1, 2)?], 0)
    };
    for (split, class_dim) in [([4, 0, 3], 1), ([40, 0, 50], 1), ([4, 0, 3], 0)] {
        let num_classes = split.iter().sum();
        let of_rows = |tensor: Tensor| match class_dim {
            0 => tensor.t()?.contiguous(),
            _ => Ok(tensor),
        };
        let logits = of_rows(nan(&random(&[3, num_classes], 3., 1)?)?)?;
        let probabilities = of_rows(nan(&random_probabilities(&[3, num_classes], 1, 3)?)?)?;
        for reduction in [Reduction::None, Reduction::Sum, Reduction::Mean, Reduction::MeanOrZero] {
            let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?)
                .with_reduction(reduction)
                .with_class_dim(class_dim);
            for (row_weights, targets) in [
                (vec![0u8, 1, 2], probabilities.clone()),
                // This row counts. The gradients of the others are finite.
                (vec![1, 1, 2], probabilities.clone()),
                (vec![0, 0, 0], probabilities.clone()),
                (vec![0, 2, 1], Tensor::new(&[-1i64, 0, 2], &CPU)?),
            ] {
                let name = format!("{row_weights:?}, {split:?}, {class_dim}, {reduction:?}");
                let is_mean_of_nothing = reduction == Reduction::Mean && row_weights == [0; 3];
                let is_nan = row_weights[0] > 0 || is_mean_of_nothing;
                let row_weights = Some(Tensor::new(row_weights, &CPU)?);
                let (loss, logits) = (loss.clone(), logits.clone());
                let case = Case { name, loss, row_weights, logits, targets };
                let (losses, _) = run_sharded(&case, class_dim, dtypes()[0], &split)?;
                assert_eq!(losses[0][0].is_nan(), is_nan, "{}", case.name);
                check(&case, class_dim, dtypes()[0], &[&split])?;
            }
        }
    }
    Ok(())
}

/// Shards of more classes than a block, a segment and a thread block take at once, and rows that are far apart.
#[test]
fn long_rows_agree_with_one_process() -> Result<()> {
    let (num_rows, split) = (3, [17_000, 33, 4967]);
    let num_classes = split.iter().sum();
    let logits = (random(&[num_rows, num_classes], 20., 1)? - 1000.)?;
    let targets = Tensor::new(&[16_999i64, 17_000, 21_999], &CPU)?;
    for smoothing in [Smoothing::over_all(0.1)?, Smoothing::over_unmasked(0.1)?] {
        let loss = LabelSmoothingLoss::new(smoothing).with_z_loss(1e-4)?;
        let (name, row_weights) = ("long rows".to_string(), None);
        let case =
            Case { name, loss, row_weights, logits: logits.clone(), targets: targets.clone() };
        check(&case, 1, dtypes()[0], &[&split])?;
    }
    Ok(())
}

/// A class that is masked everywhere, one that only one process has, and a row that one process has masked.
#[test]
fn masked_shards_agree_with_one_process() -> Result<()> {
    let logits = random(&[3, 7], 3., 1)?.to_vec2::<f64>()?;
    let masked = |row: usize, class: usize| row == 0 && class < 5 || row == 1 && class == 6;
    let logits: Vec<f64> = (0..3)
        .flat_map(|row| (0..7).map(move |class| (row, class)))
        .map(|(row, class)| if masked(row, class) { f64::NEG_INFINITY } else { logits[row][class] })
        .collect();
    let logits = Tensor::from_vec(logits, (3, 7), &CPU)?;
    let targets = Tensor::new(&[5i64, 0, 6], &CPU)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_unmasked(0.3)?);
    let (name, row_weights) = ("masked".to_string(), None);
    let case = Case { name, loss, row_weights, logits, targets };
    check(&case, 1, dtypes()[0], &SPLITS)
}

// ---- From hidden states

/// Hidden states, weight and bias.
struct Head {
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
}

/// The loss of each process, and the gradients of hidden states, weight and bias. That of the hidden states is the sum over the
/// processes.
fn run_linear(
    case: &Case,
    head: &Head,
    split: &[usize],
    tile: Option<TileSize>,
) -> Result<(Vec<Vec<f64>>, [Tensor; 3])> {
    let results = run(split.len(), |process| -> Result<(Vec<f64>, [Tensor; 3])> {
        let rank = process.rank;
        let var = |tensor: &Tensor| Var::from_tensor(&on_device(tensor)?);
        let hidden = var(&head.hidden)?;
        let weight = var(&part(&head.weight, 0, split, rank)?)?;
        let bias = var(&part(&head.bias, 0, split, rank)?)?;
        let targets = targets_of(&case.targets, head.hidden.rank() - 1, split, rank)?;
        let (loss, shard) = (case.loss_on(device())?, shard(split, rank));
        let gather = |t: &Tensor| process.gather(t);
        let loss = match tile {
            None => {
                loss.forward_linear_shard(&hidden, &weight, Some(&bias), &targets, shard, gather)?
            }
            Some(tile) => testing::forward_linear_shard_tiled(
                &loss,
                [&hidden, &weight],
                Some(&bias),
                &targets,
                shard,
                tile,
                gather,
            )?,
        };
        assert_eq!(process.num_exchanges.get(), 1);
        let gradients = sum_with_grad_output(&loss)?.backward()?;
        let gradient = |var: &Var| -> Result<Tensor> {
            let gradient = gradients.get(var).expect("no gradient arrived");
            assert_eq!(gradient.dims(), var.dims());
            gradient.to_device(&CPU)
        };
        let grad_hidden = gradients.get(&hidden).expect("no gradient reached the hidden states");
        let grad_hidden = process.gather(grad_hidden)?.sum(0)?.to_device(&CPU)?;
        Ok((values(&loss)?, [grad_hidden, gradient(&weight)?, gradient(&bias)?]))
    });
    let (losses, gradients): (Vec<_>, Vec<_>) =
        results.into_iter().collect::<Result<Vec<_>>>()?.into_iter().unzip();
    let all = |i: usize| gradients.iter().map(move |of_process: &[Tensor; 3]| &of_process[i]);
    let cat = |i: usize| Tensor::cat(&all(i).collect::<Vec<_>>(), 0);
    Ok((losses, [gradients[0][0].clone(), cat(1)?, cat(2)?]))
}

#[test]
fn hidden_states_agree_with_one_process() -> Result<()> {
    let dtype = dtypes()[0];
    let of_dtype = |tensor: Tensor| tensor.to_dtype(dtype);
    let head = Head {
        hidden: of_dtype(random(&[2, 3, 4], 1., 11)?)?,
        weight: of_dtype(random(&[7, 4], 1., 12)?)?,
        bias: of_dtype(random(&[7], 1., 13)?)?,
    };
    // The class that no label of the grid has is masked.
    let mask = [0., 0., 0., 0., 0., f64::NEG_INFINITY, 0.];
    let masked_bias = (&head.bias + of_dtype(Tensor::new(&mask, &CPU)?)?)?;
    let tolerance = if dtype == DType::F64 { 1e-12 } else { 1e-5 };
    for case in fewer_where_slow(grid(&[2, 3, 7], 2)?).step_by(5) {
        let bias = match case.name.starts_with("over_unmasked") {
            true => masked_bias.clone(),
            false => head.bias.clone(),
        };
        let head = Head { bias, hidden: head.hidden.clone(), weight: head.weight.clone() };
        let vars = [&head.hidden, &head.weight, &head.bias].map(Var::from_tensor);
        let [hidden, weight, bias] = vars;
        let (hidden, weight, bias) = (hidden?, weight?, bias?);
        let logits = hidden.broadcast_matmul(&weight.t()?)?.broadcast_add(&bias)?;
        let expected_loss = case.forward(&logits)?;
        let expected = sum_with_grad_output(&expected_loss)?.backward()?;
        let tile = TileSize { rows: 4, classes: 2 };
        for (split, tile) in SPLITS.iter().flat_map(|split| [(split, None), (split, Some(tile))]) {
            let name = format!("{}, {split:?}, {tile:?}", case.name);
            let (losses, gradients) = run_linear(&case, &head, split, tile)?;
            assert_same_bits(&name, &losses);
            assert_close(&name, &losses[0], &values(&expected_loss)?, tolerance, tolerance);
            for (var, gradient) in [&hidden, &weight, &bias].into_iter().zip(&gradients) {
                let expected = values(expected.get(var).expect("no gradient"))?;
                assert_close(&name, &values(gradient)?, &expected, tolerance, tolerance);
            }
        }
    }
    Ok(())
}

/// exp of these logits is 0, so a state that began at 0 would lose them.
#[test]
fn logits_far_below_zero() -> Result<()> {
    let dtype = dtypes()[0];
    let head = Head {
        hidden: random(&[4, 3], 1., 11)?.to_dtype(dtype)?,
        weight: random(&[7, 3], 1., 12)?.to_dtype(dtype)?,
        bias: (random(&[7], 1., 13)? - 2000.)?.to_dtype(dtype)?,
    };
    let logits = head.hidden.matmul(&head.weight.t()?)?.broadcast_add(&head.bias)?;
    let (name, row_weights) = ("far below 0".to_string(), None);
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let case = Case { name, loss, row_weights, logits, targets: random_labels(&[4], 7, 2)? };
    let expected = values(&case.forward(&case.logits)?)?;
    // The logits have digits up to 2000.
    let tolerance = if dtype == DType::F64 { 1e-11 } else { 1e-2 };
    for (split, tile) in SPLITS
        .iter()
        .flat_map(|split| [(split, None), (split, Some(TileSize { rows: 4, classes: 2 }))])
    {
        let (losses, _) = run_linear(&case, &head, split, tile)?;
        assert_close("far below 0", &losses[0], &expected, tolerance, tolerance);
    }
    Ok(())
}

/// Half types, and hidden states of another dtype than the weight.
#[test]
fn hidden_states_of_every_dtype() -> Result<()> {
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_ignore_index(1);
    let (split, targets) = ([3, 0, 4], random_labels(&[5], 7, 2)?);
    for (dtype, of_weight) in
        dtypes().into_iter().map(|dtype| (dtype, dtype)).chain([(DType::BF16, DType::F32)])
    {
        let (name, row_weights) = (format!("{dtype:?}"), None);
        let (loss, targets) = (loss.clone(), targets.clone());
        let head = Head {
            hidden: random(&[5, 4], 1., 11)?.to_dtype(dtype)?,
            weight: random(&[7, 4], 1., 12)?.to_dtype(of_weight)?,
            bias: random(&[7], 1., 13)?.to_dtype(of_weight)?,
        };
        let f64s = |tensor: &Tensor| tensor.to_dtype(DType::F64);
        let logits = f64s(&head.hidden)?.matmul(&f64s(&head.weight)?.t()?)?;
        let logits = logits.broadcast_add(&f64s(&head.bias)?)?;
        let case = Case { name, loss, row_weights, logits, targets };
        let (expected, gradient) = case.run(dtypes()[0])?;
        let (losses, [grad_hidden, grad_weight, _]) = run_linear(&case, &head, &split, None)?;
        // Where the logits have a half type, they are rounded.
        let tolerance = if dtype == DType::F64 { 1e-12 } else { 2e-2 };
        let expected_hidden = f64s(&gradient)?.matmul(&f64s(&head.weight)?)?;
        let expected_weight = f64s(&gradient)?.t()?.matmul(&f64s(&head.hidden)?)?;
        for (actual, expected) in [
            (losses[0].clone(), values(&expected)?),
            (values(&grad_hidden)?, values(&expected_hidden)?),
            (values(&grad_weight)?, values(&expected_weight)?),
        ] {
            assert_close(&case.name, &actual, &expected, tolerance, tolerance);
        }
    }
    Ok(())
}

// ---- Mistakes of others

/// Other mistakes: states that are left out, in another order, or those of another range.
#[test]
fn wrong_exchanges_and_shards_are_caught() -> Result<()> {
    let (logits, targets) = (random(&[4, 7], 3., 1)?, random_labels(&[4], 7, 2)?);
    let weights = random(&[7], 1., 4)?.abs()?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_class_weights(&weights)?;
    let expected = values(&loss.forward(&logits, &targets)?)?;
    let split = [5, 2];
    type Gather = fn(&Process, &Tensor) -> Result<Tensor>;
    let alone: Gather = |_, states| states.unsqueeze(0);
    let twice: Gather = |process, states| {
        let all = process.gather(states)?;
        Tensor::cat(&[&all, &all.narrow(0, 0, 1)?], 0)
    };
    let right: Gather = |process, states| process.gather(states);
    for (gather, moved, is_right) in
        [(right, 0, true), (alone, 0, false), (twice, 0, false), (right, 1, false)]
    {
        let results = run(2, |process| {
            let logits = on_device(&part(&logits, 1, &split, process.rank)?)?;
            let mut shard = shard(&split, process.rank);
            shard.first_class = shard.first_class.saturating_sub(moved);
            let targets = on_device(&targets)?;
            let loss = loss.forward_shard(&logits, &targets, shard, |t| gather(process, t))?;
            values(&loss)
        });
        for result in results {
            let difference = first_difference(&result?, &expected, 1e-12, 1e-12);
            assert_eq!(difference.is_none(), is_right, "{moved}: {difference:?}");
        }
    }
    Ok(())
}

// ---- Errors

/// Runs two processes of which the second has an error. Returns the loss of the first.
fn with_error<T: Send>(
    name: &str,
    right: impl Fn(&Process) -> candle_label_smoothing::Result<T> + Sync,
    wrong: impl Fn(&Process) -> candle_label_smoothing::Result<T> + Sync,
) -> T {
    let mut results = run(2, |process| {
        let result = if process.rank == 0 { right(process) } else { wrong(process) };
        assert_eq!(process.num_exchanges.get(), 1, "{name}");
        result
    });
    let (wrong, right) = (results.pop(), results.pop());
    let error = wrong.and_then(|result| result.err()).expect(name);
    assert!(!matches!(error, Error::Candle(_)), "{name}: {error}");
    match right {
        Some(Ok(result)) => result,
        Some(Err(error)) => panic!("{name}: the other process has the error {error}"),
        None => unreachable!("there are two processes"),
    }
}

/// Losses with their targets: rows that count, rows that do not, and class weights of 0.
fn losses_for_errors(
    smoothing: Smoothing,
    reduction: Reduction,
) -> Result<Vec<(&'static str, LabelSmoothingLoss, Tensor)>> {
    let loss = LabelSmoothingLoss::new(smoothing).with_reduction(reduction);
    let ignoring = loss.clone().with_ignore_index(-100);
    let weightless = loss.clone().with_class_weights(&Tensor::zeros(7, DType::F32, &CPU)?)?;
    let no_rows = loss.weigh_rows(&on_device(&Tensor::zeros(4, DType::U8, &CPU)?)?)?;
    let labels = Tensor::new(&[0i64, 6, 1, 6], &CPU)?;
    let probabilities = random_probabilities(&[4, 7], 1, 3)?.to_dtype(DType::F32)?;
    Ok(vec![
        ("labels", loss.clone(), labels.clone()),
        ("ignored labels", ignoring, Tensor::new(&[-100i64; 4], &CPU)?),
        ("class weights 0", weightless, labels.clone()),
        ("probabilities", loss, probabilities.clone()),
        ("probabilities of weight 0", no_rows, probabilities),
    ])
}

/// What one process does wrong.
#[derive(Clone, Copy, Debug)]
enum Mistake {
    FewerTargets,
    ClassesBeyondTheLast,
    IntegerLogits,
    ScalarLogits,
}

impl Mistake {
    fn apply(
        self,
        logits: Tensor,
        targets: Tensor,
        shard: Shard,
    ) -> Result<(Tensor, Tensor, Shard)> {
        Ok(match self {
            Self::FewerTargets => (logits, targets.narrow(0, 0, 3)?, shard),
            Self::ClassesBeyondTheLast => (logits, targets, Shard { first_class: 6, ..shard }),
            // On a GPU, this process takes the dtype of the others for f32.
            Self::IntegerLogits => (logits.abs()?.to_dtype(DType::U32)?, targets, shard),
            Self::ScalarLogits => (logits.sum_all()?, targets, shard),
        })
    }
}

#[test]
fn an_error_of_one_process_makes_the_loss_of_the_others_nan() -> Result<()> {
    let (logits, split) = (random(&[4, 7], 3., 1)?.to_dtype(DType::F32)?, [5, 2]);
    let reductions = [Reduction::None, Reduction::Sum, Reduction::Mean, Reduction::MeanOrZero];
    let mut losses = Vec::new();
    for reduction in reductions {
        losses.extend(losses_for_errors(Smoothing::over_all(0.1)?, reduction)?);
        losses.extend(losses_for_errors(Smoothing::over_unmasked(0.1)?, reduction)?);
    }
    let mistakes = [
        Mistake::FewerTargets,
        Mistake::ClassesBeyondTheLast,
        Mistake::IntegerLogits,
        Mistake::ScalarLogits,
    ];
    for ((kind, loss, targets), mistake) in
        losses.iter().flat_map(|loss| mistakes.map(|mistake| (loss, mistake)))
    {
        let arguments = |rank| -> Result<_> {
            let logits = on_device(&part(&logits, 1, &split, rank)?)?;
            Ok((logits, targets_of(targets, 1, &split, rank)?, shard(&split, rank)))
        };
        let forward = |process: &Process, (logits, targets, shard): (Tensor, Tensor, Shard)| {
            let logits = Var::from_tensor(&logits)?;
            let result = loss.forward_shard(&logits, &targets, shard, |t| process.gather(t))?;
            assert!(sum_with_grad_output(&result)?.backward()?.get(&logits).is_some());
            Ok(values(&result)?)
        };
        let right = |process: &Process| forward(process, arguments(0)?);
        let wrong = |process: &Process| {
            let (logits, targets, shard) = arguments(1)?;
            forward(process, mistake.apply(logits, targets, shard)?)
        };
        let losses = with_error(kind, right, wrong);
        assert!(losses.iter().all(|loss| loss.is_nan()), "{kind}, {mistake:?}: {losses:?}");
    }
    Ok(())
}

/// Errors that only the kernels of the CPU find.
#[test]
fn a_bad_target_or_row_weight_of_one_process_is_no_hang() -> Result<()> {
    if !device().is_cpu() || cfg!(emulator) {
        return Ok(());
    }
    let (logits, labels) = (random(&[2, 4], 3., 1)?, Tensor::new(&[0i64, 3], &CPU)?);
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let forward = |process: &Process, loss: &LabelSmoothingLoss, labels: &Tensor| {
        let logits = logits.narrow(1, 2 * process.rank, 2)?;
        let shard = shard(&[2, 2], process.rank);
        values(&loss.forward_shard(&logits, labels, shard, |t| process.gather(t))?)
            .map_err(Error::from)
    };
    let right = |process: &Process| forward(process, &loss, &labels);
    let bad_target = |process: &Process| forward(process, &loss, &Tensor::new(&[0i64, 4], &CPU)?);
    let bad_weight = |process: &Process| {
        forward(process, &loss.weigh_rows(&Tensor::new(&[1f32, -1.], &CPU)?)?, &labels)
    };
    assert!(with_error("a target out of range", right, bad_target)[0].is_nan());
    assert!(with_error("a negative row weight", right, bad_weight)[0].is_nan());
    Ok(())
}

#[test]
fn an_error_of_one_process_with_hidden_states() -> Result<()> {
    let hidden = on_device(&random(&[3, 4], 1., 1)?.to_dtype(dtypes()[0])?)?;
    let weight = on_device(&random(&[2, 4], 1., 2)?.to_dtype(dtypes()[0])?)?;
    let targets = on_device(&Tensor::new(&[0i64, 3, -100], &CPU)?)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?)
        .with_reduction(Reduction::MeanOrZero)
        .with_ignore_index(-100);
    let forward = |process: &Process, hidden: &Tensor, weight: &Tensor, targets: &Tensor| {
        let shard = shard(&[2, 2], process.rank);
        let loss =
            loss.forward_linear_shard(hidden, weight, None, targets, shard, |t| process.gather(t))?;
        Ok(values(&loss)?)
    };
    let right = |process: &Process| forward(process, &hidden, &weight, &targets);
    let other_size = |process: &Process| {
        forward(process, &hidden, &weight.narrow(1, 0, 3)?.contiguous()?, &targets)
    };
    let other_rows =
        |process: &Process| forward(process, &hidden, &weight, &targets.narrow(0, 0, 2)?);
    let scalar = |process: &Process| {
        forward(process, &Tensor::new(1f64, device())?.to_dtype(dtypes()[0])?, &weight, &targets)
    };
    for wrong in [&other_size as &(dyn Fn(&Process) -> _ + Sync), &other_rows, &scalar] {
        assert!(with_error("hidden states", right, wrong)[0].is_nan());
    }
    Ok(())
}

#[test]
fn what_gather_returns_is_checked() -> Result<()> {
    let logits = on_device(&random(&[2, 4], 3., 1)?.to_dtype(DType::F32)?)?;
    let targets = on_device(&Tensor::new(&[0i64, 3], &CPU)?)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let whole = Shard { first_class: 0, num_classes: 4 };
    let expected = values(&loss.forward(&logits, &targets)?)?;
    let forward = |gather: &dyn Fn(&Tensor) -> Result<Tensor>| {
        loss.forward_shard(&logits, &targets, whole, |t| gather(t))
    };
    // Views of any layout are stacked tensors too.
    let offset = |t: &Tensor| Tensor::stack(&[t, t], 0)?.narrow(0, 1, 1);
    let transposed = |t: &Tensor| t.t()?.contiguous()?.t()?.unsqueeze(0);
    let var = |t: &Tensor| Ok(Var::from_tensor(&t.unsqueeze(0)?)?.as_tensor().clone());
    for gather in [&offset as &dyn Fn(&Tensor) -> Result<Tensor>, &transposed, &var] {
        assert_close("views", &values(&forward(gather)?)?, &expected, 1e-6, 1e-6);
    }
    let beyond_memory = |t: &Tensor| t.unsqueeze(0)?.broadcast_as((1 << 45, 4, 2));
    let error = forward(&beyond_memory).expect_err("the tensor is beyond memory");
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    let not_stacked = |t: &Tensor| Ok(t.clone());
    let no_process = |t: &Tensor| t.unsqueeze(0)?.narrow(0, 0, 0);
    let other_rows = |t: &Tensor| t.narrow(1, 0, 1)?.unsqueeze(0);
    let other_dtype = |t: &Tensor| t.unsqueeze(0)?.to_dtype(DType::F16);
    for gather in
        [&not_stacked as &dyn Fn(&Tensor) -> Result<Tensor>, &no_process, &other_rows, &other_dtype]
    {
        let error = forward(gather).expect_err("the tensor is no stack");
        let is_expected = matches!(&error, Error::Gathered { stacked, .. } if stacked == &[4, 2]);
        assert!(is_expected, "{error}");
    }
    let error = forward(&|_| bail!("the network is down")).expect_err("gather failed");
    assert!(error.to_string().contains("the network is down"));
    Ok(())
}

#[test]
fn a_shard_beyond_the_classes_is_an_error() -> Result<()> {
    let logits = on_device(&random(&[2, 4], 3., 1)?.to_dtype(DType::F32)?)?;
    let targets = on_device(&Tensor::new(&[0i64, 3], &CPU)?)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    for (first_class, num_classes) in [(0, 3), (1, 4), (usize::MAX, 4), (0, 0)] {
        let shard = Shard { first_class, num_classes };
        let error = loss.forward_shard(&logits, &targets, shard, |t| t.unsqueeze(0));
        let error = error.expect_err("the shard is beyond the classes");
        let text = format!(
            "the shard has 4 classes from first_class = {first_class} on, expected classes below num_classes = {num_classes}, which must not be 0"
        );
        assert_eq!(error.to_string(), text);
    }
    let no_classes = logits.narrow(1, 0, 0)?;
    let shard = Shard { first_class: 0, num_classes: 0 };
    let error = loss.forward_shard(&no_classes, &targets, shard, |t| t.unsqueeze(0));
    assert!(matches!(error, Err(Error::Shard { .. })));
    Ok(())
}

/// Views that are larger than the memory. Only where the states of the rows would be too large, there is no exchange.
#[test]
fn shards_of_sizes_beyond_memory_are_errors() -> Result<()> {
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let number = on_device(&Tensor::new(0f32, &CPU)?)?;
    let labels = |rows: usize| on_device(&Tensor::new(0i64, &CPU)?)?.broadcast_as(rows);
    let num_exchanges = Cell::new(0);
    let gather = |tensor: &Tensor| {
        num_exchanges.set(num_exchanges.get() + 1);
        tensor.unsqueeze(0)
    };
    for (rows, classes, exchanges) in
        [(1 << 45, 4, 0), (3, usize::MAX / 2, 1), (usize::MAX / 2, 3, 0)]
    {
        num_exchanges.set(0);
        let logits = number.broadcast_as((rows, classes))?;
        let shard = Shard { first_class: 0, num_classes: classes };
        let error = loss.forward_shard(&logits, &labels(rows)?, shard, gather);
        assert!(matches!(error, Err(Error::TooLarge { .. })), "{rows}, {classes}");
        assert_eq!(num_exchanges.get(), exchanges, "{rows}, {classes}");
    }
    for rows in [1 << 45, usize::MAX / 2] {
        num_exchanges.set(0);
        let shard = Shard { first_class: 0, num_classes: 4 };
        let error = check_shards(&labels(rows)?, shard, 4, gather);
        assert!(matches!(error, Err(Error::TooLarge { .. })), "{rows}");
        assert_eq!(num_exchanges.get(), 1, "{rows}");
    }
    Ok(())
}

/// An error is found in a batch without rows too.
#[test]
fn an_error_of_one_process_without_rows() -> Result<()> {
    let logits = Tensor::zeros((0, 3), DType::F32, device())?;
    let hidden = Tensor::zeros((0, 2), DType::F32, device())?;
    let weight = Tensor::zeros((3, 2), DType::F32, device())?;
    let targets = Tensor::zeros(0, DType::I64, device())?;
    for smoothing in [Smoothing::over_all(0.1)?, Smoothing::over_unmasked(0.1)?] {
        for reduction in [Reduction::Sum, Reduction::Mean, Reduction::MeanOrZero] {
            let loss = LabelSmoothingLoss::new(smoothing.clone()).with_reduction(reduction);
            let forward = |process: &Process, shard| -> candle_label_smoothing::Result<_> {
                let gather = |t: &Tensor| process.gather(t);
                Ok(values(&loss.forward_shard(&logits, &targets, shard, gather)?)?)
            };
            let linear = |process: &Process, shard| -> candle_label_smoothing::Result<_> {
                let gather = |t: &Tensor| process.gather(t);
                let (loss, hidden) = (&loss, &hidden);
                let loss =
                    loss.forward_linear_shard(hidden, &weight, None, &targets, shard, gather)?;
                Ok(values(&loss)?)
            };
            let beyond = Shard { first_class: 4, num_classes: 6 };
            let of_logits = with_error(
                "no rows",
                |process| forward(process, shard(&[3, 3], 0)),
                |process| forward(process, beyond),
            );
            let of_hidden = with_error(
                "no rows",
                |process| linear(process, shard(&[3, 3], 0)),
                |process| linear(process, beyond),
            );
            assert!(of_logits[0].is_nan() && of_hidden[0].is_nan(), "{reduction:?}");
        }
    }
    Ok(())
}

// ---- check_shards

/// The error of each process, as text.
fn check_all(
    split: &[usize],
    targets_of: impl Fn(usize) -> Result<Tensor> + Sync,
    shard_of: impl Fn(usize) -> Shard + Sync,
) -> Vec<Option<String>> {
    run(split.len(), |process| {
        let rank = process.rank;
        let targets = on_device(&targets_of(rank).expect("targets")).expect("targets");
        let size = Cell::new(0);
        let result = check_shards(&targets, shard_of(rank), split[rank], |t| {
            size.set(t.elem_count());
            process.gather(t)
        });
        assert_eq!((process.num_exchanges.get(), size.get()), (1, 20));
        result.err().map(|error| error.to_string())
    })
}

#[test]
fn check_shards_finds_what_disagrees() -> Result<()> {
    let labels = |rows: usize| random_labels(&[rows], 7, 2);
    let split: &[usize] = SPLITS[3];
    let right = |rank| shard(split, rank);
    let agree = vec![None; 5];
    assert_eq!(check_all(split, |_| labels(1000), right), agree);
    assert_eq!(check_all(split, |_| labels(0), right), agree);
    // The dtype and the layout of the targets may differ.
    let other_dtype = |rank| match rank {
        0 => labels(6)?.to_dtype(DType::U8),
        1 => labels(6)?.reshape((2, 3)),
        2 => labels(6)?.reshape((2, 3))?.t()?.contiguous()?.t(),
        _ => labels(6),
    };
    assert_eq!(check_all(split, other_dtype, right), agree);

    // More classes than the 16 bits of a digit in the exchange.
    let large = [70_000, 64_000];
    let labels_of_large = |_| Tensor::new(&[0u32, 70_000, 133_999], &CPU);
    assert_eq!(check_all(&large, labels_of_large, |rank| shard(&large, rank)), [None, None]);

    let of_last = |normal: usize, last: usize| move |rank| if rank == 4 { last } else { normal };
    let rows = of_last(6, 5);
    let all_errors = |text: &str| vec![Some(text.to_string()); 5];
    let errors = check_all(split, |rank| labels(rows(rank)), right);
    let text = "the number of rows is 5 on process 4, expected 6: that of process 0";
    assert_eq!(errors, all_errors(text));

    let classes = of_last(7, 8);
    let other_number = |rank| Shard { num_classes: classes(rank), ..right(rank) };
    let errors = check_all(split, |_| labels(6), other_number);
    let text = "num_classes is 8 on process 4, expected 7: that of process 0";
    assert_eq!(errors, all_errors(text));

    let overlap = |rank| Shard { first_class: [0, 2, 1, 3, 6][rank], num_classes: 7 };
    let errors = check_all(split, |_| labels(6), overlap);
    let text = "first_class is 1 on process 2, expected 2: the shards follow each other from class 0 on, in the order of the processes";
    assert_eq!(errors, all_errors(text));

    let too_few = |rank| Shard { num_classes: 9, ..right(rank) };
    let errors = check_all(split, |_| labels(6), too_few);
    let text = "the end of the last shard is 7 on process 4, expected 9: num_classes";
    assert_eq!(errors, all_errors(text));

    let beyond = |rank| Shard { num_classes: 6, ..right(rank) };
    let errors = check_all(split, |_| labels(6), beyond);
    let text = "the shard has 1 classes from first_class = 6 on, expected classes below num_classes = 6, which must not be 0";
    assert_eq!(errors, all_errors(text));

    // One target of one process, and two that are exchanged.
    for changed in [[1i64, 2, 4], [3, 2, 1]] {
        let targets = move |rank| match rank {
            3 => Tensor::new(&changed, &CPU),
            _ => Tensor::new(&[1i64, 2, 3], &CPU),
        };
        let text = "the targets of process 3 differ from those of process 0, expected the same";
        assert_eq!(check_all(split, targets, right), all_errors(text));
    }

    let floats = |rank| labels(6)?.to_dtype(if rank == 2 { DType::F32 } else { DType::I64 });
    let mut expected = all_errors("process 2 found an error in its own arguments, and returned it");
    expected[2] =
        Some("the targets have dtype F32, expected an integer dtype: class indices".into());
    assert_eq!(check_all(split, floats, right), expected);
    Ok(())
}
