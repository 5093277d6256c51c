//! Deliveries a second to a receiver that is fast, beside a bare loop of HTTP requests; what one
//! that is dead costs another; and how what has waited comes once it is back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use capx_core::domain::address::Rules;
use capx_core::domain::event::Event;
use capx_core::domain::ids::WebhookId;
use capx_core::store::events;
use capx_core::store::jobs::queue;
use capx_core::store::webhooks::{self, Limits, NewWebhook};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::report::{Report, Target};
use super::{Bench, Running};

const DELIVERIES: usize = 30_000;
const DUE_TO_THE_DEAD: usize = 100_000;
/// Events a second, and for how many seconds, whose way to a healthy webhook is timed.
const CALM_RATE: usize = 100;
const CALM_S: u64 = 10;

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    rate(bench, report).await?;
    isolation(bench, report).await?;
    recovery(bench, report).await?;
    clear(bench).await
}

/// A receiver on a thread of its own, and what it has seen.
struct Receiver {
    url: String,
    seen: Arc<Seen>,
}

#[derive(Default)]
struct Seen {
    calls: AtomicUsize,
    fails: AtomicBool,
    /// How long after its event each call came, in microseconds.
    late_us: std::sync::Mutex<Vec<i64>>,
}

impl Receiver {
    /// One that answers at once, or never.
    fn start(answers: bool) -> anyhow::Result<Self> {
        let (tell, told) = std::sync::mpsc::channel();
        let seen = Arc::<Seen>::default();
        let served = Arc::clone(&seen);
        std::thread::spawn(move || -> anyhow::Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async move {
                let listener = TcpListener::bind("127.0.0.1:0").await?;
                tell.send(listener.local_addr()?)?;
                loop {
                    let (stream, _) = listener.accept().await?;
                    let seen = Arc::clone(&served);
                    tokio::spawn(async move {
                        let _ = serve(stream, &seen, answers).await;
                    });
                }
            })
        });
        Ok(Self { url: format!("http://{}/", told.recv()?), seen })
    }

    fn calls(&self) -> usize {
        self.seen.calls.load(Relaxed)
    }
}

async fn serve(stream: TcpStream, seen: &Seen, answers: bool) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    loop {
        let mut length = 0;
        loop {
            line.clear();
            if tokio::io::AsyncBufReadExt::read_line(&mut stream, &mut line).await? == 0 {
                return Ok(());
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap_or(0);
            }
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        if !answers {
            std::future::pending::<()>().await;
        }
        if seen.fails.load(Relaxed) {
            stream.write_all(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n").await?;
            continue;
        }
        seen.calls.fetch_add(1, Relaxed);
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await?;
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
        if let Some(made_us) = body["data"]["made_us"].as_i64() {
            seen.late_us.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(micros() - made_us);
        }
    }
}

/// The time of this machine, which the database is on as well.
fn micros() -> i64 {
    chrono::Utc::now().timestamp_micros()
}

async fn clear(bench: &Bench) -> anyhow::Result<()> {
    bench.reset().await?;
    sqlx::raw_sql("truncate webhooks, flows, deliveries, delivery_attempts, delivery_order")
        .execute(&bench.pool)
        .await?;
    Ok(())
}

async fn hook(bench: &Bench, url: &str, event: &str) -> anyhow::Result<()> {
    let account = sqlx::query_scalar("select id from accounts where name = 'bench'").fetch_one(&bench.pool).await?;
    let new = NewWebhook {
        webhook: WebhookId::new(),
        account: capx_core::domain::ids::AccountId(account),
        company: None,
        url,
        events: &[event.to_owned()],
        description: None,
        secret: [7; 32],
        ordered: false,
        limits: Limits::default(),
    };
    let mut connection = bench.pool.acquire().await?;
    anyhow::ensure!(webhooks::insert(&mut connection, &new).await?.is_some(), "too many webhooks");
    Ok(())
}

/// So many events at once, in one transaction.
async fn happen(bench: &Bench, name: &'static str, count: usize) -> anyhow::Result<()> {
    let mut tx = bench.engine.pool.begin().await?;
    for start in (0..count).step_by(5_000) {
        let events: Vec<Event> = (start..count.min(start + 5_000))
            .map(|n| Event::new(name, json!({"n": n, "task_id": "tsk_0", "title": "What is to be done"})))
            .collect();
        events::append(&mut *tx, bench.company, &events).await?;
    }
    tx.commit().await?;
    Ok(())
}

async fn until_received(bench: &Bench, receiver: &Receiver, count: usize) -> anyhow::Result<()> {
    bench.until(Duration::from_secs(300), "all to be received", || async { Ok(receiver.calls() >= count) }).await
}

/// The worker allows loopback, where the receivers are.
async fn worker(bench: &Bench) -> anyhow::Result<Running> {
    let worker = bench.worker_by(&[queue::WEBHOOKS], bench.slots, Rules::default().with_loopback()).await?;
    let running = Running::start(worker);
    bench.await_workers(1).await?;
    Ok(running)
}

/// Requests of a loop that does nothing else, so many at once.
async fn bare(receiver: &Receiver, count: usize, at_once: usize) -> anyhow::Result<f64> {
    // Installs the one TLS provider of this process.
    capx_workers::egress::Egress::new(Rules::default()).map_err(anyhow::Error::msg)?;
    let client = reqwest::Client::builder().no_proxy().build()?;
    let body = json!({"n": 1, "task_id": "tsk_0", "title": "What is to be done"}).to_string();
    let left = Arc::new(AtomicUsize::new(count));
    let began = Instant::now();
    let loops: Vec<_> = (0..at_once)
        .map(|_| {
            let (client, url, body, left) = (client.clone(), receiver.url.clone(), body.clone(), Arc::clone(&left));
            tokio::spawn(async move {
                while left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok() {
                    client.post(&url).body(body.clone()).send().await?.bytes().await?;
                }
                Ok::<_, reqwest::Error>(())
            })
        })
        .collect();
    for one in loops {
        one.await??;
    }
    Ok(count as f64 / began.elapsed().as_secs_f64())
}

async fn rate(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    clear(bench).await?;
    let receiver = Receiver::start(true)?;
    let count = bench.amount(DELIVERIES);
    let limit = bare(&receiver, count, 64).await?;
    hook(bench, &receiver.url, "task.*").await?;
    let running = worker(bench).await?;
    let bar = report.progress("webhooks: deliveries", 1);
    let before = receiver.calls();
    happen(bench, "task.updated", count).await?;
    let began = Instant::now();
    bench.engine.waker.wake();
    bench
        .until(Duration::from_secs(300), "all to be over", || async {
            let left: bool = sqlx::query_scalar("select exists (select from jobs)").fetch_one(&bench.pool).await?;
            Ok(!left)
        })
        .await?;
    let rate = count as f64 / began.elapsed().as_secs_f64();
    bar.finish_and_clear();
    running.stop().await;
    let sent = receiver.calls() - before;
    report.add("webhooks", "a bare loop of requests, 64 at once", limit, "requests/s");
    report
        .add("webhooks", "deliveries to one webhook", rate, "deliveries/s")
        .limit(limit)
        .target(Target::AtLeast(3_000.0));
    report.add("webhooks", "requests a delivery", sent as f64 / count as f64, "").target(Target::AtMost(1.0));
    Ok(())
}

/// How late events come to a healthy webhook in so many turns, at the 99th percentile, in milliseconds.
async fn calm(bench: &Bench, receiver: &Receiver, turns: usize) -> anyhow::Result<f64> {
    let before = receiver.calls();
    receiver.seen.late_us.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clear();
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / u32::try_from(CALM_RATE)?);
    let count = turns * CALM_RATE * usize::try_from(CALM_S)?;
    for _ in 0..count {
        ticks.tick().await;
        let event = Event::new("task.updated", json!({"made_us": micros()}));
        events::append(&bench.engine.pool, bench.company, &[event]).await?;
        bench.engine.waker.wake();
    }
    until_received(bench, receiver, before + count).await?;
    let mut late = receiver.seen.late_us.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    late.sort_unstable();
    Ok(late.get(late.len() * 99 / 100).copied().unwrap_or_default() as f64 / 1e3)
}

async fn isolation(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    clear(bench).await?;
    let (healthy, dead) = (Receiver::start(true)?, Receiver::start(false)?);
    hook(bench, &healthy.url, "task.*").await?;
    hook(bench, &dead.url, "step.*").await?;
    // A vacuum of a hundred thousand rows is another thing, and takes both cores for a moment.
    bench.autovacuum(false).await?;
    let running = worker(bench).await?;
    let bar = report.progress("webhooks: beside a dead one", 2);
    // Once to warm up, and for the disk to be done with what was before.
    calm(bench, &healthy, 1).await?;
    let alone = calm(bench, &healthy, 4).await?;
    bar.inc(1);
    happen(bench, "step.completed", bench.amount(DUE_TO_THE_DEAD)).await?;
    bench.engine.waker.wake();
    // What so many rows cost to write is over; that it is dead is not known yet.
    sqlx::raw_sql("vacuum analyze").execute(&bench.pool).await?;
    sqlx::raw_sql("checkpoint").execute(&bench.pool).await?;
    let beside = calm(bench, &healthy, 4).await?;
    bar.finish_and_clear();
    running.stop().await;
    bench.autovacuum(true).await?;
    let due: i64 = sqlx::query_scalar("select count(*) from jobs").fetch_one(&bench.pool).await?;
    report.add("webhooks", "due to a dead webhook", due as f64, "deliveries");
    report.add("webhooks", "healthy, p99 from event to call", alone, "ms");
    report.add("webhooks", "healthy beside a dead one, p99", beside, "ms");
    report.add("webhooks", "p99 beside a dead one, share of alone", beside / alone, "").target(Target::AtMost(1.2));
    Ok(())
}

async fn recovery(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    clear(bench).await?;
    let receiver = Receiver::start(true)?;
    receiver.seen.fails.store(true, Relaxed);
    hook(bench, &receiver.url, "task.*").await?;
    let running = worker(bench).await?;
    let count = bench.amount(DELIVERIES);
    let bar = report.progress("webhooks: after an outage", 1);
    happen(bench, "task.updated", count).await?;
    bench.engine.waker.wake();
    bench
        .until(Duration::from_secs(60), "the breaker to open", || async {
            let open = "select exists (select from flows where opened >= 3)";
            Ok(sqlx::query_scalar(open).fetch_one(&bench.pool).await?)
        })
        .await?;
    receiver.seen.fails.store(false, Relaxed);
    // What failed is due in minutes; the rest comes now.
    let failed: i64 =
        sqlx::query_scalar("select count(*) from jobs where state = 'scheduled'").fetch_one(&bench.pool).await?;
    let wanted = count - usize::try_from(failed)? - 8;
    let mut seconds: Vec<usize> = Vec::new();
    let mut before = 0;
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    ticks.tick().await;
    let end = Instant::now() + Duration::from_secs(300);
    while before < wanted && Instant::now() < end {
        ticks.tick().await;
        let now = receiver.calls();
        if now > 0 {
            seconds.push(now - before);
        }
        before = now;
    }
    bar.finish_and_clear();
    running.stop().await;
    // The last second is none.
    seconds.pop();
    let (sum, peak) = (seconds.iter().sum::<usize>() as f64, seconds.iter().copied().max().unwrap_or(0) as f64);
    let mean = sum / seconds.len().max(1) as f64;
    report.add("webhooks", "after an outage, mean", mean, "deliveries/s");
    report.add("webhooks", "after an outage, peak second / mean", peak / mean, "").target(Target::AtMost(2.0));
    Ok(())
}
