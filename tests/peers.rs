//! Faults of other libraries. Each test computes with a fault by candle's operations. The comparison with the reference in f64 must
//! accept this crate and reject the fault. It must also accept the same computation where the fault has no effect.

mod common;

use candle_core::{D, DType, Result, Tensor, Var};
use candle_label_smoothing::testing::{self, TileSize};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing, reference};
use candle_nn::encoding::one_hot;
use candle_nn::ops::{log_softmax, softmax};
use common::compare::{Results, assert_agrees, assert_verdict};
use common::processes::{part, run, shard};
use common::{
    CPU, Case, dtypes, fewer_where_slow, random, random_grad_output, random_labels,
    sum_with_grad_output, unreduced, values,
};

fn results((losses, gradient): (Tensor, Tensor)) -> Result<Results> {
    Ok(vec![values(&losses)?, values(&gradient)?])
}

/// Hidden states, weight and bias, f64.
struct Head([Tensor; 3]);

impl Head {
    fn random(num_rows: usize, size: usize, num_classes: usize) -> Result<Self> {
        Ok(Self([
            random(&[num_rows, size], 1., 11)?,
            random(&[num_classes, size], 1., 12)?,
            random(&[num_classes], 1., 13)?,
        ]))
    }

    /// The same numbers, rounded to a dtype.
    fn rounded(&self, dtype: DType) -> Result<Self> {
        let [hidden, weight, bias] =
            self.0.each_ref().map(|tensor| tensor.to_dtype(dtype)?.to_dtype(DType::F64));
        Ok(Self([hidden?, weight?, bias?]))
    }

    /// The losses, and the gradients of the total.
    fn run(
        &self,
        dtype: DType,
        forward: impl Fn([&Tensor; 3]) -> Result<Tensor>,
        total: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Results> {
        let vars = self.0.each_ref().map(|tensor| Var::from_tensor(&tensor.to_dtype(dtype)?));
        let [hidden, weight, bias] = vars;
        let (hidden, weight, bias) = (hidden?, weight?, bias?);
        let losses = forward([&hidden, &weight, &bias])?;
        let gradients = total(&losses)?.backward()?;
        let mut results = vec![values(&losses)?];
        for var in [hidden, weight, bias] {
            results.push(values(gradients.get(&var).expect("no gradient arrived"))?);
        }
        Ok(results)
    }

    fn run_reference(&self, loss: &LabelSmoothingLoss, targets: &Tensor) -> Result<Results> {
        let forward = |head: [&Tensor; 3]| Ok(reference::forward(loss, &logits(head)?, targets)?);
        self.run(DType::F64, forward, sum_with_grad_output)
    }
}

fn logits([hidden, weight, bias]: [&Tensor; 3]) -> Result<Tensor> {
    hidden.matmul(&weight.t()?)?.broadcast_add(bias)
}

/// `forward_linear` in tiles, which are kept if `budget` allows.
fn tiled(
    loss: &LabelSmoothingLoss,
    [hidden, weight, bias]: [&Tensor; 3],
    targets: &Tensor,
    (rows, classes): (usize, usize),
    budget: usize,
) -> Result<Tensor> {
    let tile = TileSize { rows, classes };
    Ok(testing::forward_linear_tiled_within_budget(
        loss,
        hidden,
        weight,
        Some(bias),
        targets,
        tile,
        budget,
    )?)
}

/// `forward_linear_shard` or `forward_shard`. The result has the gradients of all processes.
fn sharded(
    loss: &LabelSmoothingLoss,
    [hidden, weight, bias]: [&Tensor; 3],
    targets: &Tensor,
    split: &[usize],
    from_logits: bool,
) -> Result<Tensor> {
    let losses = run(split.len(), |process| -> Result<Tensor> {
        let (rank, gather) = (process.rank, |t: &Tensor| process.gather(t));
        let (weight, bias) = (part(weight, 0, split, rank)?, part(bias, 0, split, rank)?);
        let shard = shard(split, rank);
        Ok(match from_logits {
            true => {
                let logits = logits([hidden, &weight, &bias])?;
                loss.forward_shard(&logits, targets, shard, gather)?
            }
            false => {
                loss.forward_linear_shard(hidden, &weight, Some(&bias), targets, shard, gather)?
            }
        })
    });
    let losses = losses.into_iter().collect::<Result<Vec<_>>>()?;
    let mut result = losses[0].clone();
    // The value is that of the first process. Each process has the gradients of its own classes.
    for loss in &losses[1..] {
        result = (result + (loss - loss.detach())?)?;
    }
    Ok(result)
}

/// The losses with smoothing, from the logarithms of the softmax and their mean in each row.
fn smoothed_losses(
    log_softmax: &Tensor,
    labels: &Tensor,
    epsilon: f64,
    mean: &Tensor,
) -> Result<Tensor> {
    let of_label = log_softmax.gather(&labels.unsqueeze(1)?, 1)?.squeeze(1)?;
    (of_label * (epsilon - 1.))? - (mean * epsilon)?
}

/// Compares both functions over a split vocabulary with the expected results.
fn check_shards(
    loss: &LabelSmoothingLoss,
    head: &Head,
    labels: &Tensor,
    split: &[usize],
    dtype: DType,
    expected: &Results,
) -> Result<()> {
    let is_half = dtype.size_in_bytes() < 4;
    // candle would round the logits of half types, and the sum of the hidden states' gradients over the processes.
    let from_logits = if is_half { &[false][..] } else { &[false, true] };
    let comparable = |mut results: Results| {
        if is_half {
            results.remove(1);
        }
        results
    };
    for &from_logits in from_logits {
        let forward = |head: [&Tensor; 3]| sharded(loss, head, labels, split, from_logits);
        let actual = comparable(head.run(dtype, forward, sum_with_grad_output)?);
        let expected = comparable(expected.clone());
        assert_agrees(&format!("shards {split:?}, {from_logits}"), dtype, &actual, &expected);
    }
    Ok(())
}

// ---- 1. grad_output

/// Liger-Kernel issues 678 and 968 and pull request 1298, and TransformerEngine pull request 2139: the backward from hidden states
/// multiplied all gradients by one number, the first of grad_output. With the reduction none each row has its own.
#[test]
fn one_grad_output_for_all_rows() -> Result<()> {
    let (head, labels) = (Head::random(9, 4, 21)?, random_labels(&[9], 21, 2)?);
    let ignored = labels.to_vec1::<i64>()?[3];
    let loss = unreduced(Smoothing::over_all(0.1)?).with_ignore_index(ignored);
    let ones = Tensor::ones(9, DType::F64, &CPU)?;
    for dtype in dtypes() {
        let head = head.rounded(dtype)?;
        let exact = |grad_output: &Tensor| {
            let forward =
                |head: [&Tensor; 3]| Ok(reference::forward(&loss, &logits(head)?, &labels)?);
            head.run(DType::F64, forward, |losses| (losses * grad_output)?.sum_all())
        };
        for (grad_output, is_uniform) in
            [(random_grad_output(&[9])?, false), ((&ones * 0.7)?, true)]
        {
            let expected = exact(&grad_output)?;
            for (tile, budget) in [((9, 21), usize::MAX), ((9, 21), 0), ((2, 8), 0)] {
                let actual = head.run(
                    dtype,
                    |head| tiled(&loss, head, &labels, tile, budget),
                    |losses| (losses * grad_output.to_dtype(losses.dtype())?)?.sum_all(),
                )?;
                assert_agrees(&format!("{tile:?}, {budget}"), dtype, &actual, &expected);
            }
            let rows = values(&grad_output)?;
            for factor in [rows[0], rows.iter().sum::<f64>() / rows.len() as f64] {
                let mut peer = exact(&ones)?;
                for gradient in peer[1..].iter_mut().flatten() {
                    *gradient *= factor;
                }
                assert_verdict("one factor", dtype, &peer, &expected, is_uniform);
            }
        }
    }
    Ok(())
}

// ---- 2. Nothing that counts

/// How a peer makes a mean of the groups of rows that its tiles or shards have.
#[derive(Clone, Copy, Debug)]
enum PeerMean {
    /// The mean of each group, weighted by its share of all rows that count.
    OfMeans,
    /// The mean of each group, whose divisor is at least 1, and the mean of these.
    OfClampedMeans,
}

/// The mean of the rows that count in one of the groups. A group has 1 for each of its rows, else 0.
fn peer_mean(rule: PeerMean, losses: &Tensor, groups: &[Tensor]) -> Result<Tensor> {
    let counts = groups.iter().map(|group| group.sum_all()?.to_scalar::<f64>());
    let counts = counts.collect::<Result<Vec<_>>>()?;
    let total: f64 = counts.iter().sum();
    let mut result = Tensor::zeros((), DType::F64, &CPU)?;
    for (group, count) in groups.iter().zip(counts) {
        let sum = (losses * group)?.sum_all()?;
        let share = match rule {
            PeerMean::OfMeans => ((sum / count)? * (count / total))?,
            PeerMean::OfClampedMeans => ((sum / count.max(1.))? / groups.len() as f64)?,
        };
        result = (result + share)?;
    }
    Ok(result)
}

/// The rows that count of each tile of two rows, and of each shard: those whose label it has.
fn groups(labels: &[i64; 6], split: &[usize]) -> Result<[Vec<Tensor>; 2]> {
    let group = |is_in: &dyn Fn(usize, i64) -> bool| {
        let rows = labels.iter().enumerate();
        let rows = rows.map(|(row, &label)| f64::from(label >= 0 && is_in(row, label)));
        Tensor::from_iter(rows, &CPU)
    };
    let of_tiles = (0..3).map(|tile| group(&|row, _| row / 2 == tile));
    let of_shards = (0..split.len()).map(|rank| {
        let first = shard(split, rank).first_class;
        group(&|_, label| (first..first + split[rank]).contains(&(label as usize)))
    });
    Ok([of_tiles.collect::<Result<_>>()?, of_shards.collect::<Result<_>>()?])
}

const SPLIT: [usize; 3] = [4, 2, 5];
/// Every tile of two rows and every shard has two labels.
const FULL: [i64; 6] = [1, 4, 6, 3, 5, 10];
/// A tile is ignored, and a shard has no label.
const ONE_EMPTY: [i64; 6] = [1, 3, -100, -100, 6, 10];
const ALL_IGNORED: [i64; 6] = [-100; 6];

/// Compares tiles and shards with the expected results.
fn check_tiles_and_shards(
    loss: &LabelSmoothingLoss,
    head: &Head,
    labels: &Tensor,
    dtype: DType,
    expected: &Results,
) -> Result<()> {
    for (tile, budget) in [((2, 11), usize::MAX), ((2, 11), 0), ((2, 3), 0)] {
        let forward = |head: [&Tensor; 3]| tiled(loss, head, labels, tile, budget);
        let actual = head.run(dtype, forward, sum_with_grad_output)?;
        assert_agrees(&format!("tiles of {tile:?}, {budget}"), dtype, &actual, expected);
    }
    check_shards(loss, head, labels, &SPLIT, dtype, expected)
}

/// Checks that the rules of peers are rejected unless every group has the same number of rows that count.
fn check_peer_means(
    reduction: Reduction,
    head: &Head,
    labels: &[i64; 6],
    dtype: DType,
    expected: &Results,
) -> Result<()> {
    let targets = Tensor::new(&labels.map(|label| label.max(0)), &CPU)?;
    for groups in groups(labels, &SPLIT)? {
        for rule in [PeerMean::OfMeans, PeerMean::OfClampedMeans] {
            let forward = |head: [&Tensor; 3]| {
                let log_softmax = log_softmax(&logits(head)?, D::Minus1)?;
                let mean = log_softmax.mean(1)?;
                peer_mean(rule, &smoothed_losses(&log_softmax, &targets, 0.1, &mean)?, &groups)
            };
            let peer = head.run(DType::F64, forward, sum_with_grad_output)?;
            // 0 is what `MeanOrZero` gives for no rows.
            let is_zero = matches!(rule, PeerMean::OfClampedMeans) && *labels == ALL_IGNORED;
            let is_right = *labels == FULL || is_zero && reduction == Reduction::MeanOrZero;
            assert_verdict(&format!("{rule:?}, {labels:?}"), dtype, &peer, expected, is_right);
        }
    }
    Ok(())
}

/// torchtune issue 2341 and OpenRLHF pull request 583: the mean of a slice whose rows are all ignored is 0/0. Its NaN reaches the
/// whole loss, or the divisor is wrong if such a slice counts as a row.
#[test]
fn tiles_and_shards_without_a_row_that_counts() -> Result<()> {
    let head = Head::random(6, 4, 11)?;
    let reductions = [Reduction::Mean, Reduction::MeanOrZero, Reduction::Sum, Reduction::None];
    for (dtype, reduction) in dtypes().into_iter().flat_map(|dtype| reductions.map(|r| (dtype, r)))
    {
        let head = head.rounded(dtype)?;
        let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_reduction(reduction);
        let ignoring = loss.clone().with_ignore_index(-100);
        for labels in [FULL, ONE_EMPTY, ALL_IGNORED] {
            let counts = labels.map(|label| u8::from(label >= 0));
            let targets = Tensor::new(&labels, &CPU)?;
            let masked = loss.weigh_rows(&Tensor::new(&counts, &CPU)?)?;
            let expected = head.run_reference(&ignoring, &targets)?;
            for loss in [&ignoring, &masked] {
                check_tiles_and_shards(loss, &head, &targets, dtype, &expected)?;
            }
            if matches!(reduction, Reduction::Mean | Reduction::MeanOrZero) {
                check_peer_means(reduction, &head, &labels, dtype, &expected)?;
            }
        }
    }
    Ok(())
}

// ---- 3. The softcap

/// The losses of a peer that pads the logits to a multiple of its vector width, and then caps them. The sum over all lanes makes the
/// logsumexp.
fn softcap_with_padding(
    logits: &Tensor,
    labels: &Tensor,
    [epsilon, cap]: [f64; 2],
    padding: f64,
) -> Result<Tensor> {
    let (num_rows, num_classes) = logits.dims2()?;
    let num_padded = num_classes.next_multiple_of(8) - num_classes;
    let padding = Tensor::full(padding, (num_rows, num_padded), &CPU)?;
    let lanes = Tensor::cat(&[logits, &padding], 1)?;
    let lanes = ((lanes / cap)?.tanh()? * cap)?;
    let of_label = lanes.gather(&labels.unsqueeze(1)?, 1)?.squeeze(1)?;
    let mean = lanes.narrow(1, 0, num_classes)?.mean(1)?;
    let smoothed = ((of_label * (1. - epsilon))? + (mean * epsilon)?)?;
    lanes.log_sum_exp(1)? - smoothed
}

/// Unsloth pull request 10616: the softcap makes the −∞ of padded lanes −cap, and keeps a padding of 0. So the lanes that are no
/// class enter the logsumexp.
#[test]
fn padded_lanes_in_the_softcap() -> Result<()> {
    let (epsilon, cap) = (0.1, 3.);
    let mut cases = Vec::new();
    for num_classes in (1..=70).chain([257, 1001]) {
        cases.push(Case {
            name: format!("{num_classes} classes"),
            loss: unreduced(Smoothing::over_all(epsilon)?).with_softcap(cap)?,
            row_weights: None,
            logits: (random(&[3, num_classes], 4., 1)? - 2.)?,
            targets: random_labels(&[3], num_classes, 2)?,
        });
    }
    for (case, dtype) in fewer_where_slow(cases)
        .flat_map(|case| dtypes().into_iter().map(move |d| (case.clone(), d)))
    {
        let case = Case { logits: case.logits.to_dtype(dtype)?.to_dtype(DType::F64)?, ..case };
        let expected = results(case.run_reference(DType::F64)?)?;
        assert_agrees(&case.name, dtype, &results(case.run(dtype)?)?, &expected);
        for padding in [0., f64::NEG_INFINITY] {
            let peer = results(case.run_with(DType::F64, |logits| {
                softcap_with_padding(logits, &case.targets, [epsilon, cap], padding)
            })?)?;
            let is_right = case.logits.dim(1)? % 8 == 0;
            assert_verdict(&case.name, dtype, &peer, &expected, is_right);
        }
    }
    Ok(())
}

// ---- 4. Half types

/// The softmax and the smoothed targets, (N, K) both.
fn softmax_and_targets(logits: &Tensor, labels: &Tensor, epsilon: f64) -> Result<(Tensor, Tensor)> {
    let num_classes = logits.dim(1)?;
    let targets = one_hot(labels.clone(), num_classes, 1., 0.)?;
    let targets = ((targets * (1. - epsilon))? + epsilon / num_classes as f64)?;
    Ok((softmax(logits, D::Minus1)?, targets))
}

/// Liger-Kernel pull request 1329 and TransformerEngine pull request 3193: the gradient is stored in a buffer of the logits' dtype
/// before the target is subtracted. Where the model is confident of the label, the difference loses its digits.
#[test]
fn softmax_is_rounded_before_the_target_is_subtracted() -> Result<()> {
    let labels = random_labels(&[4], 40, 2)?;
    let confident = (one_hot(labels.clone(), 40, 9f64, 0.)? + random(&[4, 40], 1., 1)?)?;
    for (dtype, epsilon) in dtypes().into_iter().flat_map(|dtype| [(dtype, 0.), (dtype, 0.1)]) {
        let logits = confident.to_dtype(dtype)?.to_dtype(DType::F64)?;
        let loss = unreduced(Smoothing::over_all(epsilon)?);
        // The hidden states are the logits, so they get the logits' gradient.
        let identity = Tensor::eye(40, DType::F64, &CPU)?;
        let head = Head([logits.clone(), identity, Tensor::zeros(40, DType::F64, &CPU)?]);
        let expected = head.run_reference(&loss, &labels)?;
        for tile in [(4, 40), (4, 8)] {
            let forward = |head: [&Tensor; 3]| tiled(&loss, head, &labels, tile, 0);
            let actual = head.run(dtype, forward, sum_with_grad_output)?;
            assert_agrees(&format!("{epsilon}, {tile:?}"), dtype, &actual, &expected);
        }
        let case = Case {
            name: format!("{epsilon}"),
            loss,
            row_weights: None,
            logits: logits.clone(),
            targets: labels.clone(),
        };
        let expected = expected[..2].to_vec();
        assert_agrees(&case.name, dtype, &results(case.run(dtype)?)?, &expected);

        let (softmax, targets) = softmax_and_targets(&logits, &labels, epsilon)?;
        let difference = (softmax.to_dtype(dtype)? - targets.to_dtype(dtype)?)?;
        let grad_output = random_grad_output(&[4])?.unsqueeze(1)?;
        let peer = difference.to_dtype(DType::F64)?.broadcast_mul(&grad_output)?;
        let peer = vec![expected[0].clone(), values(&peer)?];
        let is_right = dtype.size_in_bytes() >= 4;
        assert_verdict(&case.name, dtype, &peer, &expected, is_right);
    }
    Ok(())
}

/// The product of two matrices as a sum over tiles, each of which is rounded, like the sum.
fn product_in_tiles(a: &Tensor, b: &Tensor, tile: usize, dtype: DType) -> Result<Tensor> {
    let len = b.dim(0)?;
    let mut sum = Tensor::zeros((a.dim(0)?, b.dim(1)?), dtype, &CPU)?;
    for start in (0..len).step_by(tile) {
        let tile = tile.min(len - start);
        let product = a.narrow(1, start, tile)?.matmul(&b.narrow(0, start, tile)?)?;
        sum = (sum + product.to_dtype(dtype)?)?;
    }
    Ok(sum)
}

/// Liger-Kernel pull request 1391: the gradients of the tiles are summed in the dtype of the weight. Each addition of a half type
/// rounds.
#[test]
fn gradients_of_tiles_are_summed_in_a_half_type() -> Result<()> {
    let (head, labels) = (Head::random(64, 8, 96)?, random_labels(&[64], 96, 2)?);
    let loss = unreduced(Smoothing::over_all(0.1)?);
    for dtype in dtypes() {
        let head = head.rounded(dtype)?;
        let expected = head.run_reference(&loss, &labels)?;
        let forward = |head: [&Tensor; 3]| tiled(&loss, head, &labels, (4, 4), 0);
        let actual = head.run(dtype, forward, sum_with_grad_output)?;
        assert_agrees("tiles", dtype, &actual, &expected);

        let [hidden, weight, bias] = &head.0;
        let logits = logits([hidden, weight, bias])?;
        let (softmax, targets) = softmax_and_targets(&logits, &labels, 0.1)?;
        let gradient =
            (softmax - targets)?.broadcast_mul(&random_grad_output(&[64])?.unsqueeze(1)?)?;
        let is_right = dtype.size_in_bytes() >= 4;
        for (i, product) in [
            (1, product_in_tiles(&gradient, weight, 4, dtype)?),
            (2, product_in_tiles(&gradient.t()?.contiguous()?, hidden, 4, dtype)?),
        ] {
            let mut peer = expected.clone();
            peer[i] = values(&product)?;
            assert_verdict(&format!("gradient {i}"), dtype, &peer, &expected, is_right);
        }
    }
    Ok(())
}

// ---- 5. A split vocabulary

/// Megatron-LM issues 737 and 7452: the smoothing of a split vocabulary is the mean over the classes of the process.
#[test]
fn smoothing_over_the_local_classes() -> Result<()> {
    let (head, labels) = (Head::random(4, 3, 7)?, random_labels(&[4], 7, 2)?);
    let epsilon = 0.1;
    let loss = unreduced(Smoothing::over_all(epsilon)?);
    for (dtype, split) in dtypes()
        .into_iter()
        .flat_map(|dtype| [&[7][..], &[5, 2], &[1, 4, 2]].map(|split| (dtype, split)))
    {
        let head = head.rounded(dtype)?;
        let expected = head.run_reference(&loss, &labels)?;
        check_shards(&loss, &head, &labels, split, dtype, &expected)?;
        let log_softmax = log_softmax(&logits(head.0.each_ref())?, D::Minus1)?;
        for rank in 0..split.len() {
            let sum = part(&log_softmax, 1, split, rank)?.sum(1)?;
            // The number of classes of the process, or of all.
            for divisor in [split[rank], 7] {
                let mean = (&sum / divisor as f64)?;
                let peer = values(&smoothed_losses(&log_softmax, &labels, epsilon, &mean)?)?;
                let name = format!("{split:?}, process {rank}, divisor {divisor}");
                let (peer, expected) = (vec![peer], expected[..1].to_vec());
                assert_verdict(&name, dtype, &peer, &expected, split.len() == 1);
            }
        }
    }
    Ok(())
}
