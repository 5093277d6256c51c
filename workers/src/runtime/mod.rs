//! The worker loop: a session with one beat for everything, batch claims, the
//! attempts on apalis, batch commits, and an orderly end.
//!
//! What it survives: the database going away (it waits and goes on), the
//! death of its session (it drops what it runs and opens another), its own
//! death at any instruction (others take over when the lease is out). It
//! never judges by its own clock, and never drops a database call half-way.

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use capx_core::domain::backoff::Backoff;
use capx_core::engine::Engine;
use capx_core::engine::advance::Committed;
use capx_core::engine::claim::Claimed;
use capx_core::engine::sweep;
use capx_core::failpoint;
use capx_core::store::StoreError;
use capx_core::store::sessions::{self, NewSession};
use futures_util::FutureExt;
use sqlx::PgPool;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::handlers::Hands;

mod attempt;
mod backend;
mod beat;
mod claimer;
mod committer;
mod done;
mod kills;
mod load;
pub mod panics;
mod timers;
mod watchdog;

use done::Done;
use load::{Held, Load};
use watchdog::UNANSWERED_MAX;
pub(crate) use watchdog::Watchdog;

/// How a worker works.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Host and process, for people.
    pub name: String,
    /// Which queues it serves.
    pub queues: Vec<String>,
    /// How many attempts at once.
    pub slots: usize,
    /// How long its session lives without a beat; the beat is a sixth of it.
    pub lease: Duration,
    /// How long attempts may go on after a stop was asked for.
    pub drain: Duration,
    /// Longest pause between two looks at an idle queue.
    pub poll: Duration,
    /// A call of the database that is not answered for so long never will be:
    /// the worker gives up.
    pub unanswered: Duration,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            name: default_name(),
            queues: capx_core::store::jobs::queue::ALL.iter().map(|q| (*q).to_owned()).collect(),
            slots: 64,
            lease: Duration::from_secs(30),
            drain: Duration::from_secs(120),
            poll: Duration::from_secs(1),
            unanswered: UNANSWERED_MAX,
        }
    }
}

fn default_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = if host.trim().is_empty() { "worker" } else { host.trim() };
    format!("{host}-{}", std::process::id())
}

/// Counters that anybody may read while the worker runs.
#[derive(Debug, Default)]
pub struct Counters {
    /// Jobs claimed.
    pub claimed: AtomicU64,
    /// Outcomes written.
    pub committed: AtomicU64,
    /// Outcomes refused because the lease was gone.
    pub lost: AtomicU64,
    /// Sessions lost.
    pub sessions_lost: AtomicU64,
    /// Time spent in claims, in microseconds, and how many there were.
    pub claim_us: AtomicU64,
    /// How many claims there were.
    pub claims: AtomicU64,
}

/// A worker of this process.
#[derive(Debug, Clone)]
pub struct Worker {
    engine: Engine,
    /// For the beat's own connection.
    url: String,
    /// For the listener; hints are optional.
    listen: Option<PgPool>,
    config: WorkerConfig,
    hands: Arc<Hands>,
    counters: Arc<Counters>,
    observer: Option<Observer>,
    watchdog: Watchdog,
    out_of_reach: Arc<Mutex<Option<Instant>>>,
}

/// Told of every attempt when its handler starts: the job and the moment.
pub type Observer = mpsc::UnboundedSender<(i64, Instant)>;

/// What the parts of a session share.
pub(crate) struct Shared {
    pub engine: Engine,
    pub config: WorkerConfig,
    pub hands: Arc<Hands>,
    pub counters: Arc<Counters>,
    pub observer: Option<Observer>,
    pub session: i64,
    /// What it has in hand.
    pub load: Arc<Load>,
    /// There may be something to claim.
    pub nudge: Arc<Notify>,
    /// A timer of our own is due.
    pub timer: Arc<Notify>,
    /// Somebody's lease has run out.
    pub silence: Arc<Notify>,
    /// Dead letters are to be tried again.
    pub redrives: Notify,
    /// What went through queues since that was last counted.
    pub done: Done,
    /// There are webhooks, to be told of what is committed.
    pub tells: AtomicBool,
    /// When the database was last out of reach, if ever.
    pub out_of_reach: Arc<Mutex<Option<Instant>>>,
    /// Claim no more, continue no more.
    pub stopping: CancellationToken,
    /// The session is dead or its owner gives up: attempts end now.
    pub lost: CancellationToken,
    /// An operator has asked this worker to drain.
    pub drain: CancellationToken,
    /// Tells the beat that this worker drains.
    pub draining: Arc<AtomicBool>,
    /// Over every call of the database.
    pub watchdog: Watchdog,
    /// Who was stopped at once.
    pub kills: Arc<kills::Kills>,
}

/// A claimed job on its way through this worker.
pub(crate) struct Assignment {
    pub claimed: Claimed,
    pub held: Held,
}

/// The worker cannot go on in this process, which should end.
#[derive(Debug, thiserror::Error)]
#[error("the database left a call unanswered, on a connection that is dead without knowing it; start the worker again")]
pub struct Wedged;

/// How a session ended.
enum Ended {
    Stopped,
    Lost,
}

impl Worker {
    /// A worker over an engine; `url` is for the connection of its beat.
    pub fn new(engine: Engine, url: &str, config: WorkerConfig, hands: Hands) -> Self {
        Self {
            engine,
            url: url.to_owned(),
            listen: None,
            watchdog: Watchdog::new(config.unanswered),
            out_of_reach: Arc::default(),
            config,
            hands: Arc::new(hands),
            counters: Arc::new(Counters::default()),
            observer: None,
        }
    }

    /// The same, listening for hints on a pool.
    #[must_use]
    pub fn listening(mut self, pool: PgPool) -> Self {
        self.listen = Some(pool);
        self
    }

    /// The same, telling somebody of every attempt.
    #[must_use]
    pub fn observed_by(mut self, observer: Observer) -> Self {
        self.observer = Some(observer);
        self
    }

    /// What it has done so far.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Runs until `stop`, or until an operator says so, then drains: session after
    /// session, should one be lost. An error means that the process should end, and be started again.
    pub async fn run(&self, stop: CancellationToken) -> Result<(), Wedged> {
        tokio::select! {
            () = self.sessions(stop) => Ok(()),
            () = self.watchdog.bitten() => Err(Wedged),
        }
    }

    async fn sessions(&self, stop: CancellationToken) {
        let nudge = Arc::new(Notify::new());
        let listener =
            self.listen.clone().map(|pool| tokio::spawn(capx_core::engine::wake::listen(pool, Arc::clone(&nudge))));
        while !stop.is_cancelled() {
            let Some((session, renewed)) = self.open_session(&stop).await else { break };
            match self.run_session(session, renewed, Arc::clone(&nudge), &stop).await {
                Ended::Stopped => break,
                Ended::Lost => {
                    self.counters.sessions_lost.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    tracing::warn!(session.id = session, "the session was lost; a new one begins");
                }
            }
        }
        if let Some(listener) = listener {
            listener.abort();
        }
    }

    /// Opens a session, waiting for the database as long as it takes.
    async fn open_session(&self, stop: &CancellationToken) -> Option<(i64, Duration)> {
        let new = NewSession {
            worker: &self.config.name,
            version: env!("CARGO_PKG_VERSION"),
            queues: &self.config.queues,
            slots: i32::try_from(self.config.slots).unwrap_or(i32::MAX),
            lease: self.config.lease,
        };
        let mut failures = 0;
        loop {
            let opening = async {
                let mut connection = self.engine.pool.acquire().await?;
                // The lease counts from before the row was written.
                let renewed = beat::boot_time();
                Ok::<_, StoreError>((sessions::open(&mut *connection, &new).await?, renewed))
            };
            match self.watchdog.answer("a session's start", opening).await {
                Ok(opened) => {
                    failpoint::reach("session.opened").await;
                    return Some(opened);
                }
                Err(error) => {
                    failures += 1;
                    tracing::warn!(%error, failures, "no session yet; is the database up and migrated?");
                    if !pause(failures, stop).await {
                        return None;
                    }
                }
            }
        }
    }

    async fn run_session(
        &self,
        session: i64,
        renewed: Duration,
        nudge: Arc<Notify>,
        stop: &CancellationToken,
    ) -> Ended {
        let shared = Arc::new(Shared {
            engine: self.engine.clone(),
            config: self.config.clone(),
            hands: Arc::clone(&self.hands),
            counters: Arc::clone(&self.counters),
            observer: self.observer.clone(),
            session,
            load: Arc::new(Load::new(self.config.slots)),
            nudge,
            timer: Arc::new(Notify::new()),
            silence: Arc::new(Notify::new()),
            redrives: Notify::new(),
            done: Done::default(),
            tells: AtomicBool::new(false),
            out_of_reach: Arc::clone(&self.out_of_reach),
            stopping: CancellationToken::new(),
            lost: CancellationToken::new(),
            drain: CancellationToken::new(),
            draining: Arc::new(AtomicBool::new(false)),
            watchdog: self.watchdog.clone(),
            kills: Arc::default(),
        });
        let over = CancellationToken::new();
        // Should this future be dropped, the beat must not vouch for it.
        let _over = over.clone().drop_guard();
        let beat = beat::spawn(&self.url, &shared, renewed, over.clone());
        let (assign, assigned) = mpsc::unbounded_channel();
        let (done, finished) = mpsc::unbounded_channel();
        let tasks = TaskTracker::new();
        committer::spawn(&tasks, &shared, finished, assign.clone());
        timers::spawn(&tasks, &shared, over.clone());
        tasks.spawn(vital(&shared, "kill switch", kills::run(Arc::clone(&shared), over.clone())));
        let claimer = tasks.spawn(vital(&shared, "claimer", claimer::run(Arc::clone(&shared), assign)));
        let attempts = tasks.spawn(backend::serve(Arc::clone(&shared), assigned, done, over.clone()));
        tasks.close();

        let ended = tokio::select! {
            () = stop.cancelled() => Ended::Stopped,
            () = shared.drain.cancelled() => Ended::Stopped,
            () = shared.lost.cancelled() => Ended::Lost,
        };
        shared.stopping.cancel();
        // A claim under way may still bring jobs in hand; one that waits for
        // the database does so no longer than a drain.
        let mut claimer = claimer;
        let until = tokio::time::Instant::now() + self.config.drain;
        if tokio::time::timeout_at(until, &mut claimer).await.is_err() {
            shared.lost.cancel();
            let _ = claimer.await;
        }
        self.wind_down(&shared, &ended, until).await;
        // Everything is back: apalis has nothing left to wait for.
        over.cancel();
        let _ = attempts.await;
        tasks.wait().await;
        failpoint::reach("session.before_end").await;
        self.watchdog.answer("a session's end", self.end_session(session)).await;
        let _ = tokio::task::spawn_blocking(move || beat.join()).await;
        ended
    }

    /// Ends a session in order, and puts back at once what it may still hold.
    async fn end_session(&self, session: i64) {
        if let Err(error) = sessions::end(&self.engine.pool, session).await {
            tracing::debug!(%error, session.id = session, "the session ends by its lease");
            return;
        }
        if let Err(error) = sweep::sweep(&self.engine, timers::retake_delay(&self.config), false).await {
            tracing::debug!(%error, session.id = session, "what it held is left to the next sweep");
        }
    }

    /// Stop claiming, let attempts finish, take back what does not, until
    /// nothing is in hand.
    async fn wind_down(&self, shared: &Shared, ended: &Ended, until: tokio::time::Instant) {
        shared.stopping.cancel();
        shared.draining.store(true, std::sync::atomic::Ordering::Relaxed);
        let until = if matches!(ended, Ended::Stopped) { until } else { tokio::time::Instant::now() };
        if tokio::time::timeout_at(until, shared.load.until_empty()).await.is_err() {
            // Handlers end at their next await; their jobs are released.
            shared.lost.cancel();
            self.watchdog.answer("the last commits", shared.load.until_empty()).await;
        }
    }
}

/// A part of the worker that it cannot do without: should it panic, the session
/// is given up, since its beat would vouch for what no longer works.
pub(crate) fn vital(
    shared: &Arc<Shared>,
    name: &'static str,
    part: impl Future<Output = ()> + Send + 'static,
) -> impl Future<Output = ()> + Send + 'static {
    let lost = shared.lost.clone();
    async move {
        if AssertUnwindSafe(part).catch_unwind().await.is_err() {
            tracing::error!(part = name, "a part of the worker panicked; the session is given up");
            lost.cancel();
        }
    }
}

/// Sleeps before another try at an unwilling database; false when stopped.
pub(crate) async fn pause(failures: u32, stop: &CancellationToken) -> bool {
    let backoff = Backoff { initial: Duration::from_millis(100), max: Duration::from_secs(2), ..Backoff::default() };
    let delay = backoff.delay(failures, rand::random()) + Duration::from_millis(20);
    tokio::select! {
        () = stop.cancelled() => false,
        () = tokio::time::sleep(delay) => true,
    }
}

/// Sends on what a commit says: the next step to the attempts, or nothing.
pub(crate) fn after_commit(
    shared: &Shared,
    committed: Committed,
    mut held: Held,
    assign: &mpsc::UnboundedSender<Assignment>,
) {
    use std::sync::atomic::Ordering::Relaxed;
    match committed {
        Committed::Continue(job, work) => {
            shared.counters.committed.fetch_add(1, Relaxed);
            let claimed = Claimed { job, work: capx_core::engine::claim::Work::Step(work) };
            held.resume();
            let _ = assign.send(Assignment { claimed, held });
        }
        Committed::Settled => {
            shared.counters.committed.fetch_add(1, Relaxed);
        }
        Committed::Later => {
            shared.counters.committed.fetch_add(1, Relaxed);
            shared.timer.notify_one();
        }
        Committed::Lost => {
            shared.counters.lost.fetch_add(1, Relaxed);
            metrics::counter!("capx_leases_lost_total").increment(1);
        }
    }
}
