//! Secrets are sealed here, and opened for the attempts that need them.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use super::{Engine, EngineError, FieldProblem};
use crate::domain::ids::{CompanyId, RunId};
use crate::domain::outcome::Failure;
use crate::domain::plan::RunContext;
use crate::domain::playbook::Playbook;
use crate::domain::secret::Secrets;
use crate::domain::secret::seal::{Keys, SealError, Sealed};
use crate::store::secrets;

/// The keys of this process. A file is read again when a key is not among them, so that
/// keys are changed while all is running.
#[derive(Debug, Clone, Default)]
pub struct Keyring {
    file: Option<PathBuf>,
    keys: Arc<RwLock<Arc<Keys>>>,
}

impl Keyring {
    /// Keys that stay.
    pub fn fixed(keys: Keys) -> Self {
        Self { file: None, keys: Arc::new(RwLock::new(Arc::new(keys))) }
    }

    /// Those of a file; the error says what is wrong with it.
    pub fn of_file(path: PathBuf) -> Result<Self, String> {
        let keys = read(&path)?;
        Ok(Self { file: Some(path), ..Self::fixed(keys) })
    }

    /// The keys as they were last read.
    pub fn keys(&self) -> Arc<Keys> {
        Arc::clone(&self.keys.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The keys as they are now. A file that has become unreadable changes nothing.
    pub async fn latest(&self) -> Arc<Keys> {
        if let Some(path) = self.file.clone() {
            match tokio::task::spawn_blocking(move || read(&path)).await {
                Ok(Ok(keys)) => *self.keys.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(keys),
                Ok(Err(error)) => tracing::warn!(error, "the keys for secrets could not be read again"),
                Err(error) => tracing::warn!(%error, "the keys for secrets could not be read again"),
            }
        }
        self.keys()
    }

    async fn open(&self, company: CompanyId, name: &str, sealed: &Sealed) -> Result<String, SealError> {
        match self.keys().open(company, name, sealed) {
            Err(SealError::UnknownKey(_) | SealError::NoKey) if self.file.is_some() => {
                self.latest().await.open(company, name, sealed)
            }
            opened => opened,
        }
    }
}

fn read(path: &std::path::Path) -> Result<Keys, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    Keys::parse(&text).map_err(|error| format!("{}: {error}", path.display()))
}

/// What the tools of a run are given, or why nothing.
pub type Opened = Result<Arc<Secrets>, Failure>;

/// The secrets of the runs whose playbooks name any.
pub(super) async fn load(
    engine: &Engine,
    contexts: &HashMap<Uuid, RunContext>,
) -> Result<HashMap<Uuid, Opened>, EngineError> {
    let naming = || contexts.values().filter(|context| !context.playbook.secrets.is_empty());
    let mut companies: Vec<Uuid> = naming().map(|context| context.company.0).collect();
    companies.sort_unstable();
    companies.dedup();
    if companies.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = secrets::of_companies(&engine.pool, &companies).await?;
    let sealed: HashMap<(CompanyId, &str), &Sealed> =
        rows.iter().map(|(company, name, sealed)| ((*company, name.as_str()), sealed)).collect();
    let mut opened = HashMap::new();
    for context in naming() {
        opened.insert(context.run.0, open(engine, context.company, context.run, &context.playbook, &sealed).await);
    }
    Ok(opened)
}

async fn open(
    engine: &Engine,
    company: CompanyId,
    run: RunId,
    plan: &Playbook,
    sealed: &HashMap<(CompanyId, &str), &Sealed>,
) -> Opened {
    let mut opened = Vec::with_capacity(plan.secrets.len());
    for name in plan.secrets.keys() {
        let Some(sealed) = sealed.get(&(company, name.as_str())) else {
            return Err(Failure::invalid(lacks(name)));
        };
        match engine.keyring.open(company, name, sealed).await {
            Ok(value) => opened.push((name.clone(), value)),
            Err(error) => {
                tracing::error!(%company, %run, secret = name, %error, "a secret does not open");
                // Another worker may have the key.
                return Err(Failure::transient(format!("the secret `{name}` does not open: {error}")));
            }
        }
    }
    let too_many = || Failure::invalid("the secrets are too large to be taken out of what comes back");
    Secrets::new(opened).map(Arc::new).ok_or_else(too_many)
}

fn lacks(name: &str) -> String {
    format!("the company has no secret `{name}`; set it, such as by `capx secret set {name}`")
}

/// A run needs the secrets that its playbook names.
pub(super) async fn has_all(tx: &mut PgConnection, company: CompanyId, plan: &Playbook) -> Result<(), EngineError> {
    if plan.secrets.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = plan.secrets.keys().cloned().collect();
    let missing = secrets::missing(tx, company, &names).await?;
    if missing.is_empty() {
        return Ok(());
    }
    Err(EngineError::Invalid(missing.iter().map(|name| FieldProblem::new("secrets", lacks(name))).collect()))
}

/// Seals all secrets with the first key, one by one; how many there were.
pub async fn reseal(connection: &mut PgConnection, keys: &Keys) -> Result<u64, EngineError> {
    let first = keys.first().ok_or(SealError::NoKey).map_err(sealing)?.to_owned();
    let mut done = 0;
    loop {
        let mut tx = connection.begin().await?;
        let Some((company, name, sealed)) = secrets::sealed_otherwise(&mut tx, &first).await? else { break };
        let said = |error: SealError| sealing_of(company, &name, &error);
        let value = keys.open(company, &name, &sealed).map_err(said)?;
        let sealed = keys.seal(company, &name, &value).map_err(said)?;
        secrets::reseal(&mut tx, company, &name, &sealed).await?;
        tx.commit().await?;
        done += 1;
    }
    Ok(done)
}

/// What the caller is told.
pub fn sealing(error: SealError) -> EngineError {
    EngineError::Conflict(error.to_string())
}

fn sealing_of(company: CompanyId, name: &str, error: &SealError) -> EngineError {
    EngineError::Conflict(format!("the secret `{name}` of {company}: {error}"))
}
