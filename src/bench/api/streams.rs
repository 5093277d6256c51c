//! Streams: many readers of one busy log, and very many of a silent one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use axum::body::Body;
use axum::http::StatusCode;
use capx_core::domain::event::{Event, TASK_CREATED};
use capx_core::store::events;
use futures_util::StreamExt as _;
use serde_json::json;
use tokio::time::MissedTickBehavior;

use super::client::Connection;
use super::{Bench, Report, Stage, Target};
use crate::bench::latency::percentile;

const READERS: usize = 200;
const EVENTS: usize = 1_000_000;
/// What is written at a time, and how often.
const BATCH: usize = 40;
const EVERY: Duration = Duration::from_millis(10);
/// Streams that nothing happens on.
const IDLE: usize = 10_000;
/// Of those, opened at the same time.
const OPENERS: usize = 32;
/// A stream that says nothing for so long has lost something.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) async fn run(bench: &Bench, report: &mut Report, stage: &Stage) -> anyhow::Result<()> {
    idle(bench, report, stage).await?;
    busy(bench, report, stage).await
}

async fn open(stage: &Stage, n: usize) -> anyhow::Result<axum::body::BodyDataStream> {
    let path = format!("{}/activity?stream=true", stage.get);
    let response = Connection::open(stage.address).await?.send(&stage.call(n, "GET", &path)).await?;
    anyhow::ensure!(response.status() == StatusCode::OK, "a stream was refused: {}", response.status());
    let mut body = Body::new(response.into_body()).into_data_stream();
    // It says at once that it is there.
    anyhow::ensure!(matches!(body.next().await, Some(Ok(_))), "a stream ended at once");
    Ok(body)
}

/// Every event to every reader, and how late the oldest of each piece came.
async fn busy(bench: &Bench, report: &mut Report, stage: &Stage) -> anyhow::Result<()> {
    let events = bench.amount(EVENTS);
    let read = Arc::new(AtomicU64::new(0));
    let mut readers = Vec::with_capacity(READERS);
    for n in 0..READERS {
        let body = open(stage, n).await?;
        readers.push(tokio::spawn(follow(body, events as u64, Arc::clone(&read))));
    }
    let bar = report.progress("api: 200 readers of a log", (READERS * events) as u64);
    let began = Instant::now();
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    for first in (0..events).step_by(BATCH) {
        ticks.tick().await;
        let sent = now_us();
        let batch: Vec<Event> = (first..events.min(first + BATCH))
            .map(|n| Event::new(TASK_CREATED, json!({"n": n, "sent": sent, "task_id": "tsk_0", "title": "a task"})))
            .collect();
        events::append(&bench.pool, bench.company, &batch).await?;
        bar.set_position(read.load(Relaxed));
    }
    let written = events as f64 / began.elapsed().as_secs_f64();
    let mut lags = Vec::new();
    let mut missed = 0;
    for reader in readers {
        let (count, late) = reader.await??;
        missed += events as u64 - count;
        lags.extend(late);
    }
    bar.finish_and_clear();
    report.add("api", "events written while 200 read", written, "/s");
    report.add("api", "events missed by 200 readers", missed as f64, "").target(Target::AtMost(0.0));
    report.add("api", "from write to reader, p50", percentile(&mut lags, 0.5), "ms");
    report.add("api", "from write to reader, p99", percentile(&mut lags, 0.99), "ms").target(Target::AtMost(250.0));
    report.add("api", "memory of the API, peak", stage.memory(), "MiB");
    bench.reset().await
}

/// Reads events until all are there; each must be the one behind the last.
async fn follow(
    mut body: axum::body::BodyDataStream,
    events: u64,
    read: Arc<AtomicU64>,
) -> anyhow::Result<(u64, Vec<Duration>)> {
    let (mut next, mut rest, mut lags) = (0, Vec::<u8>::new(), Vec::new());
    while next < events {
        let Ok(Some(piece)) = tokio::time::timeout(PATIENCE, body.next()).await else { break };
        rest.extend_from_slice(&piece?);
        let Some(end) = memchr::memmem::rfind(&rest, b"\n\n").map(|at| at + 2) else { continue };
        let whole = &rest[..end];
        let before = next;
        for at in memchr::memmem::find_iter(whole, b"\"n\":") {
            let n = number(&whole[at + 4..]);
            anyhow::ensure!(n == next, "event {n} came where {next} was due");
            next += 1;
        }
        if let Some(at) = memchr::memmem::find(whole, b"\"sent\":") {
            lags.push(Duration::from_micros(now_us().saturating_sub(number(&whole[at + 7..]))));
        }
        read.fetch_add(next - before, Relaxed);
        rest.drain(..end);
    }
    Ok((next, lags))
}

fn number(text: &[u8]) -> u64 {
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit());
    digits.fold(0, |number, digit| 10 * number + u64::from(digit - b'0'))
}

fn now_us() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    now.as_micros().try_into().unwrap_or(u64::MAX)
}

/// What streams cost on which nothing happens.
async fn idle(bench: &Bench, report: &mut Report, stage: &Stage) -> anyhow::Result<()> {
    let streams = bench.amount(IDLE);
    let bar = report.progress("api: idle streams", streams as u64);
    let mut open_streams = Vec::with_capacity(streams);
    for first in (0..streams).step_by(OPENERS) {
        let opening = (first..streams.min(first + OPENERS)).map(|n| open(stage, n));
        open_streams.extend(futures_util::future::try_join_all(opening).await?);
        bar.set_position(open_streams.len() as u64);
    }
    // Two comments and several looks at the key.
    tokio::time::sleep(Duration::from_secs(35)).await;
    bar.finish_and_clear();
    report.add("api", "memory of the API, 10,000 streams", stage.memory(), "MiB").target(Target::AtMost(200.0));
    Ok(())
}
