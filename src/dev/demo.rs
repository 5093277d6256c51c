//! The demo company, its playbooks, and its first run, shown as it happens.

use std::time::Duration;

use anyhow::{Context, bail};
use capx_core::domain::ids::{AccountId, AgentId, CompanyId, PlaybookId};
use capx_core::domain::playbook::load;
use capx_core::domain::run::RunStatus;
use capx_core::engine::playbooks::CreatePlaybook;
use capx_core::engine::tenants::CreateCompany;
use capx_core::engine::{Engine, playbooks, start, tenants as companies};
use capx_core::store::agents::NewAgent;
use capx_core::store::playbooks::{self as stored, Filter};
use capx_core::store::{events, runs, tenants};
use serde_json::{Map, json};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use super::Interrupted;
use super::show::Show;

/// The account of the first key.
pub(super) const ACCOUNT: &str = "dev";
const COMPANY: &str = "Demo Company";
/// The playbooks of the repository's `playbooks/`, the first of them run.
const PLAYBOOKS: &[&str] = &[
    include_str!("../../playbooks/hello.yml"),
    include_str!("../../playbooks/weekly-market-report.yml"),
    include_str!("../../playbooks/publish-with-approval.yml"),
];
const PATIENCE: Duration = Duration::from_secs(30);

/// What the demo consists of.
pub(super) struct Demo {
    pub company: CompanyId,
    pub hello: PlaybookId,
}

/// Makes the company and its playbooks, or finds those of an earlier start.
pub(super) async fn prepare(engine: &Engine, pool: &PgPool) -> anyhow::Result<Demo> {
    let account = tenants::account(pool, ACCOUNT, "enterprise").await?;
    let company = match find(pool, account).await? {
        Some(company) => company,
        None => create(engine, account).await?,
    };
    let mut hello = None;
    for yaml in PLAYBOOKS {
        let playbook = match named(pool, company, yaml).await? {
            // It may have been changed since, by whoever tries things out.
            Some(known) => known,
            None => upload(engine, company, yaml).await?,
        };
        hello = hello.or(Some(playbook));
    }
    Ok(Demo { company, hello: hello.context("there is no demo playbook")? })
}

async fn named(pool: &PgPool, company: CompanyId, yaml: &str) -> anyhow::Result<Option<PlaybookId>> {
    let name = load(yaml).map_err(|problems| anyhow::anyhow!("a demo playbook: {problems:?}"))?.name;
    let filter = Filter { company: Some(company), name: Some(&name), ..Filter::default() };
    let found = stored::list(pool, &filter, 1).await?;
    Ok(found.into_iter().next().map(|row| row.playbook))
}

async fn upload(engine: &Engine, company: CompanyId, yaml: &str) -> anyhow::Result<PlaybookId> {
    let request = CreatePlaybook { name: None, description: None, yaml: yaml.to_owned(), tags: vec!["demo".into()] };
    let created = playbooks::create(engine, company, &request)
        .await
        .map_err(|error| anyhow::anyhow!("a demo playbook does not load: {error:?}"))?;
    Ok(created.upserted.playbook)
}

async fn find(pool: &PgPool, account: AccountId) -> anyhow::Result<Option<CompanyId>> {
    let all = tenants::companies(pool, account, None, None, None, 100).await?;
    Ok(all.into_iter().find(|company| company.name == COMPANY).map(|company| company.company))
}

async fn create(engine: &Engine, account: AccountId) -> anyhow::Result<CompanyId> {
    let agent = |role: &str, instructions: &str| NewAgent {
        agent: AgentId::new(),
        role: role.into(),
        adapter: "claude".into(),
        instructions: instructions.into(),
        model: None,
        budget: None,
        config: json!({"heartbeat_interval": 300}),
    };
    let request = CreateCompany {
        name: COMPANY.into(),
        description: Some("Made by `capx dev`, to be tried and thrown away.".into()),
        config: json!({"governance": "autonomous", "timezone": "UTC"}),
        governance: None,
        template: None,
        agents: vec![
            agent("researcher", "Research topics and produce structured reports."),
            agent("writer", "Write clear texts from research."),
        ],
    };
    let (company, _) = companies::create_company(engine, account, &request).await?;
    Ok(company)
}

/// Runs the first playbook and shows what happens until it ends.
pub(super) async fn run(engine: &Engine, demo: &Demo, show: &Show, stop: &CancellationToken) -> anyhow::Result<()> {
    let started = start::start_run(engine, demo.company, demo.hello, Map::new(), "manual")
        .await
        .map_err(|error| anyhow::anyhow!("the demo does not start: {error:?}"))?;
    let until = tokio::time::Instant::now() + PATIENCE;
    let mut seen = 0;
    loop {
        Interrupted::check(stop)?;
        // Asked before the events, so that none of an ended run is missed.
        let row = runs::get(&engine.pool, demo.company, started.run).await?.context("the demo's run is gone")?;
        for event in events::of_run(&engine.pool, demo.company, started.run, seen, 100).await? {
            seen = event.seq.unwrap_or(seen);
            show.event(&event);
        }
        match row.status {
            RunStatus::Completed => return Ok(()),
            status if status.is_terminal() => bail!("the demo's run {status:?}: {}", row.error.unwrap_or_default()),
            _ if tokio::time::Instant::now() > until => {
                bail!(
                    "the demo's run {} has not ended after {} s: it may wait behind other work",
                    started.run,
                    PATIENCE.as_secs()
                )
            }
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}
