//! Creating playbooks and their versions.

use std::collections::HashSet;

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use super::{Engine, EngineError, FieldProblem, repeating, triggers};
use crate::domain::digest::sha256;
use crate::domain::ids::{CompanyId, PlaybookId};
use crate::domain::playbook::model::{OWN, StepKind};
use crate::domain::playbook::{self, Playbook, Problem};
use crate::store::playbooks::{Filter, NewPlaybook, Upserted};
use crate::store::{StoreError, agents, children, jobs, playbooks};

/// A request to create a playbook.
#[derive(Debug, Clone)]
pub struct CreatePlaybook {
    /// Unique within the company; wins over the name in the text.
    pub name: Option<String>,
    /// For people.
    pub description: Option<String>,
    /// The definition.
    pub yaml: String,
    /// For filters.
    pub tags: Vec<String>,
}

/// A created playbook.
#[derive(Debug)]
pub struct Created {
    /// Which, and whether anything is new.
    pub upserted: Upserted,
    /// Its name.
    pub name: String,
    /// The model.
    pub playbook: Playbook,
    /// What will fail at run time unless something changes.
    pub warnings: Vec<String>,
}

/// Checks and stores a playbook, or says everything that is wrong with it.
pub async fn create(engine: &Engine, company: CompanyId, request: &CreatePlaybook) -> Result<Created, EngineError> {
    repeating(|| async {
        let mut tx = engine.pool.begin().await?;
        let created = create_in(&mut tx, company, request).await?;
        tx.commit().await?;
        Ok(created)
    })
    .await
}

/// The same in the caller's transaction.
pub async fn create_in(
    tx: &mut PgConnection,
    company: CompanyId,
    request: &CreatePlaybook,
) -> Result<Created, EngineError> {
    let (playbook, mut warnings) = check(&request.yaml)?;
    let name = request.name.clone().unwrap_or_else(|| playbook.name.clone());
    not_ours(&name)?;
    let description = request.description.clone().or_else(|| playbook.description.clone());
    warnings.extend(role_warnings(tx, company, &playbook).await?);
    warnings.extend(call_warnings(tx, company, &playbook).await?);
    let new = NewPlaybook {
        company,
        name: &name,
        description: description.as_deref(),
        tags: &request.tags,
        yaml: &request.yaml,
        hash: sha256(&request.yaml),
        step_count: count(&playbook),
    };
    let upserted = playbooks::upsert(tx, &new).await?;
    if upserted.changed {
        triggers::sync(tx, company, upserted.playbook).await?;
    }
    Ok(Created { upserted, name, playbook, warnings })
}

/// Names of our own playbooks are nobody else's.
fn not_ours(name: &str) -> Result<(), EngineError> {
    match name.starts_with(OWN) {
        true => Err(EngineError::Invalid(vec![FieldProblem::new("name", format!("must not begin with `{OWN}`"))])),
        false => Ok(()),
    }
}

/// Reads a definition with its warnings, or says everything that is wrong with it.
pub fn check(yaml: &str) -> Result<(Playbook, Vec<String>), EngineError> {
    let (playbook, warnings) = playbook::read(yaml).map_err(|problems| invalid(yaml, &problems))?;
    Ok((playbook, warnings.iter().map(ToString::to_string).collect()))
}

fn count(playbook: &Playbook) -> i32 {
    i32::try_from(playbook.steps.len()).unwrap_or(i32::MAX)
}

/// Changes of a playbook; what is left out stays.
#[derive(Debug, Clone, Default)]
pub struct UpdatePlaybook {
    /// Unique within the company.
    pub name: Option<String>,
    /// For people.
    pub description: Option<String>,
    /// Another definition.
    pub yaml: Option<String>,
    /// For filters.
    pub tags: Option<Vec<String>>,
}

/// Changes a playbook in the caller's transaction.
pub async fn update(
    tx: &mut PgConnection,
    company: CompanyId,
    id: PlaybookId,
    changes: &UpdatePlaybook,
) -> Result<(), EngineError> {
    let model = changes.yaml.as_deref().map(check).transpose()?;
    let yaml = changes.yaml.as_deref().unwrap_or_default();
    let filter = Filter { company: Some(company), playbook: Some(id), ..Filter::default() };
    let current = playbooks::list(&mut *tx, &filter, 1).await?.pop().ok_or(EngineError::NotFound("playbook"))?;
    not_ours(&current.name)?;
    not_ours(changes.name.as_deref().unwrap_or_default())?;
    let new = NewPlaybook {
        company,
        name: changes.name.as_deref().unwrap_or(&current.name),
        description: changes.description.as_deref(),
        tags: changes.tags.as_deref().unwrap_or_default(),
        yaml,
        hash: sha256(yaml),
        step_count: model.as_ref().map_or(0, |(playbook, _)| count(playbook)),
    };
    let updated = playbooks::update(&mut *tx, id, &new, changes.tags.is_some(), changes.yaml.is_some()).await;
    updated.map_err(|error| match error {
        StoreError::Conflict { constraint } if constraint == "playbooks_name" => {
            EngineError::Conflict(format!("the company has another playbook named `{}`", new.name))
        }
        other => other.into(),
    })?;
    triggers::sync(tx, company, id).await
}

/// Sets a playbook's status in the caller's transaction; says since when it has it. Killed,
/// its runs stop at once, in the middle of their calls, until it is active again.
pub async fn set_status(
    tx: &mut PgConnection,
    company: CompanyId,
    id: PlaybookId,
    status: &str,
    killed: bool,
) -> Result<DateTime<Utc>, EngineError> {
    let at = playbooks::set_status(&mut *tx, company, id, status, killed).await?;
    if status == "active" {
        // What was stopped at once goes on.
        jobs::unkill(tx, company, id).await?;
    }
    triggers::sync(tx, company, id).await?;
    Ok(at)
}

/// Deletes a playbook that has no runs.
pub async fn delete(tx: &mut PgConnection, company: CompanyId, id: PlaybookId) -> Result<(), EngineError> {
    if playbooks::delete(&mut *tx, company, id).await? {
        return triggers::sync(tx, company, id).await;
    }
    Err(EngineError::Conflict("the playbook has runs, whose history would be lost; archive it instead".into()))
}

/// Every problem of a text as a problem of the field `yaml`, with its place,
/// cause, suggestion and the line it stands in.
fn invalid(text: &str, problems: &[Problem]) -> EngineError {
    let fields = problems.iter().map(|problem| {
        let excerpt = problem.excerpt(text).map(|e| format!("\n{e}")).unwrap_or_default();
        FieldProblem::new("yaml", format!("{problem}{excerpt}"))
    });
    EngineError::Invalid(fields.collect())
}

/// Playbooks that steps name and the company has not.
async fn call_warnings(
    tx: &mut PgConnection,
    company: CompanyId,
    playbook: &Playbook,
) -> Result<Vec<String>, EngineError> {
    let mut called: Vec<&str> = playbook
        .steps
        .iter()
        .filter_map(|step| match &step.kind {
            StepKind::Playbook(name) if *name != playbook.name => Some(name.as_str()),
            _ => None,
        })
        .collect();
    called.sort_unstable();
    called.dedup();
    let mut warnings = Vec::new();
    for name in called {
        if children::playbook(tx, company, name).await?.is_none() {
            warnings.push(format!("this company has no playbook `{name}` yet, so a run fails at its step"));
        }
    }
    Ok(warnings)
}

async fn role_warnings(
    tx: &mut PgConnection,
    company: CompanyId,
    playbook: &Playbook,
) -> Result<Vec<String>, EngineError> {
    let agents = agents::agents_of(tx, &[company.0]).await?;
    let known: HashSet<&str> = agents.iter().map(|agent| agent.role.as_str()).collect();
    let mut warned = HashSet::new();
    Ok(playbook
        .steps
        .iter()
        .chain(&playbook.closing)
        .flat_map(|step| {
            let judge = step.rubric.as_ref().and_then(|rubric| rubric.judge.as_deref());
            step.role.as_deref().into_iter().chain(judge)
        })
        .filter(|role| !known.contains(role) && warned.insert(*role))
        .map(|role| {
            let near = playbook::problem::did_you_mean(role, known.iter().copied())
                .map(|hint| format!("; {hint}"))
                .unwrap_or_default();
            format!("no agent of this company has the role `{role}` yet, so a run fails at its step{near}")
        })
        .collect())
}
