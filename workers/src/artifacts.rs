//! What steps say that is large, on its way to the database and back. Bytes first, the
//! step's commit afterwards: a reference that is stored leads to something.

use std::time::Duration;

use capx_core::domain::artifact::{ARTIFACT_BYTES_MAX, Artifact, JSON, RUN_ARTIFACTS_BYTES_MAX, take_out};
use capx_core::domain::ids::{CompanyId, RunId};
use capx_core::domain::outcome::{Failure, Outcome};
use capx_core::failpoint;
use capx_core::store::StoreError;
use capx_core::store::artifacts::{self as store, Admitted, CHUNK_BYTES};
use capx_core::store::fans;
use capx_core::store::jobs::Lease;
use serde_json::Value;
use sqlx::PgPool;

use crate::egress::{Large, room_for};
use crate::runtime::Watchdog;

/// How often and after which pause bytes are stored again when the database is away:
/// longer than most leases live.
const TRIES_MAX: u32 = 60;
const PAUSE: Duration = Duration::from_secs(1);

/// The artifacts of a run, for one attempt at a step of it.
#[derive(Debug)]
pub struct Artifacts<'a> {
    pub(crate) pool: &'a PgPool,
    pub(crate) watchdog: &'a Watchdog,
    pub(crate) lease: Lease,
    pub(crate) company: CompanyId,
    pub(crate) run: RunId,
}

/// What a reference leads to, with the room that it takes up.
#[derive(Debug)]
pub struct Given {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// What they are, by the reference.
    pub content_type: String,
    /// Held while the bytes are, where they are large.
    pub room: Large,
}

impl Artifacts<'_> {
    /// Stores bytes, and gives the reference to them.
    pub async fn put(&self, artifact: Artifact, bytes: Vec<u8>) -> Result<Value, Failure> {
        if bytes.len() > ARTIFACT_BYTES_MAX {
            let size = bytes.len();
            return Err(Failure::invalid(format!(
                "the output is {size} bytes, over the limit of {ARTIFACT_BYTES_MAX} of an artifact"
            )));
        }
        let (pool, watchdog) = (self.pool.clone(), self.watchdog.clone());
        let (lease, of, value) = (self.lease, (self.company, self.run), artifact.to_value());
        let put = whole("stored", async move {
            let mut tries = 0;
            loop {
                // What was paid for is not lost for a moment without the database.
                match put(&pool, &watchdog, lease, of, &artifact, &bytes).await {
                    Err(error) if error.is_passing() && tries < TRIES_MAX => {
                        tracing::warn!(%error, "an artifact waits for the database");
                        tries += 1;
                        tokio::time::sleep(PAUSE).await;
                    }
                    done => return done,
                }
            }
        });
        match put.await {
            Ok(Admitted::New | Admitted::Known) => Ok(value),
            Ok(Admitted::Lost) => Err(Failure::transient("the attempt is no longer this worker's")),
            Ok(Admitted::Full) => Err(Failure::invalid(format!(
                "the artifacts of the run are over the limit of {RUN_ARTIFACTS_BYTES_MAX} bytes together"
            ))),
            Err(failure) => Err(failure),
        }
    }

    /// The bytes that a reference leads to.
    pub async fn get(&self, artifact: &Artifact) -> Result<Vec<u8>, Failure> {
        let (pool, watchdog, company) = (self.pool.clone(), self.watchdog.clone(), self.company);
        let sha256 = artifact.sha256.clone();
        let bytes = whole("read", async move { get(&pool, &watchdog, company, &sha256).await }).await?;
        bytes.ok_or_else(|| Failure::invalid(format!("the company has no artifact {}", artifact.sha256)))
    }

    /// What a value refers to, if it is a reference.
    pub async fn given(&self, value: Option<&Value>) -> Result<Option<Given>, Failure> {
        let Some(artifact) = value.and_then(Artifact::of) else { return Ok(None) };
        let room = room_for(artifact.bytes).await;
        let bytes = self.get(&artifact).await?;
        Ok(Some(Given { bytes, content_type: artifact.content_type, room }))
    }

    /// What the items of a step have said, in the order of its list, as one artifact.
    pub async fn list(&self, step: i32, round: u32, (items, done): (u32, usize)) -> Outcome {
        let (pool, watchdog, of) = (self.pool.clone(), self.watchdog.clone(), (self.company, self.run));
        let round = i32::try_from(round).unwrap_or(i32::MAX);
        let read = whole("read", async move {
            let outputs = fans::outputs(&pool, of, step, round, ARTIFACT_BYTES_MAX);
            watchdog.answer("the outputs of items", outputs).await
        });
        let outputs = match read.await {
            Ok(outputs) if outputs.len() == done => outputs,
            Ok(_) => {
                return Outcome::failed(Failure::invalid(format!(
                    "the outputs of {done} items are over the limit of {ARTIFACT_BYTES_MAX} bytes together; \
                     let each item say less"
                )));
            }
            Err(failure) => return Outcome::failed(failure),
        };
        let mut list = String::from("[");
        let mut outputs = outputs.into_iter().peekable();
        for item in 0..i32::try_from(items).unwrap_or(i32::MAX) {
            list.push_str(if item == 0 { "\n" } else { ",\n" });
            let output = outputs.next_if(|(place, _)| *place == item);
            list.push_str(output.as_ref().map_or("null", |(_, output)| output));
        }
        list.push_str("\n]\n");
        let bytes = list.into_bytes();
        match self.put(Artifact::of_bytes(&bytes, JSON), bytes).await {
            Ok(reference) => Outcome::done(reference),
            Err(failure) => Outcome::failed(failure),
        }
    }

    /// Stores what is too large of an outcome, and leaves references in its place.
    pub async fn keep(&self, outcome: Outcome) -> Outcome {
        let Outcome::Done { mut output, cost } = outcome else { return outcome };
        for (artifact, bytes) in take_out(&mut output) {
            if let Err(failure) = self.put(artifact, bytes).await {
                return Outcome::Failed { failure, cost };
            }
        }
        Outcome::Done { output, cost }
    }
}

async fn put(
    pool: &PgPool,
    watchdog: &Watchdog,
    lease: Lease,
    of: (CompanyId, RunId),
    artifact: &Artifact,
    bytes: &[u8],
) -> Result<Admitted, StoreError> {
    let what = "an artifact";
    let admitted = watchdog.answer(what, store::admit(pool, lease, of, artifact)).await?;
    failpoint::reach("artifact.booked").await;
    if admitted != Admitted::New {
        return Ok(admitted);
    }
    for (seq, chunk) in bytes.chunks(CHUNK_BYTES).enumerate() {
        watchdog.answer(what, store::put_chunk(pool, of.0, artifact, seq, chunk)).await?;
        failpoint::reach("artifact.in_part").await;
    }
    watchdog.answer(what, store::finish(pool, of.0, artifact)).await?;
    failpoint::reach("artifact.stored").await;
    Ok(admitted)
}

async fn get(
    pool: &PgPool,
    watchdog: &Watchdog,
    company: CompanyId,
    sha256: &str,
) -> Result<Option<Vec<u8>>, StoreError> {
    let what = "an artifact";
    let Some(artifact) = watchdog.answer(what, store::find(pool, company, sha256)).await? else { return Ok(None) };
    let mut bytes = Vec::with_capacity(artifact.bytes);
    for seq in 0..artifact.bytes.div_ceil(CHUNK_BYTES) {
        let chunk = watchdog.answer(what, store::chunk(pool, company, sha256, seq)).await?;
        bytes.extend(chunk.unwrap_or_default());
    }
    Ok((bytes.len() == artifact.bytes).then_some(bytes))
}

/// A call of the database as a task of its own: none is dropped half-way.
async fn whole<T: Send + 'static>(
    what: &str,
    call: impl Future<Output = Result<T, StoreError>> + Send + 'static,
) -> Result<T, Failure> {
    let trouble =
        |error: &dyn std::error::Error| Failure::transient(format!("the artifact could not be {what}: {error}"));
    tokio::spawn(call).await.map_err(|error| trouble(&error))?.map_err(|error| trouble(&error))
}
