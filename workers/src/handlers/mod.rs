//! What a job's attempt does. Handlers get what they need as arguments and
//! return an outcome; whether it counts is for the engine to decide.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capx_core::domain::digest;
use capx_core::domain::governance::{Action, Policy};
use capx_core::domain::ids::{CompanyId, RunId};
use capx_core::domain::outcome::{ErrorClass, Failure, Outcome};
use capx_core::domain::plan::{Draft, JUNCTION};
use capx_core::domain::playbook::load::TOOLS;
use capx_core::domain::playbook::model::StepKind;
use capx_core::domain::playbook::rubric::GRADE;
use capx_core::domain::playbook::{Playbook, Step};
use capx_core::domain::secret::Secrets;
use capx_core::engine::beats;
use capx_core::engine::claim::StepWork;
use capx_core::store::agents::AgentRow;
use capx_core::store::jobs::{ClaimedJob, kind};
use serde_json::{Map, Value, json};

use crate::adapters::Providers;
use crate::agent;
use crate::artifacts::Artifacts;
use crate::deeds::Deeds;
use crate::egress::{self, Egress};
use crate::journal::Journals;
use crate::mcp::McpServers;
use crate::sandbox::Sandbox;
use crate::tools::workspace::Workspaces;
use crate::tools::{self, Search, ToolCall};

/// What the attempts of a worker can reach.
#[derive(Debug)]
pub struct Hands {
    /// The way out of the machine.
    pub egress: Egress,
    /// Where runs keep their files.
    pub workspaces: Workspaces,
    /// Which models may be asked.
    pub providers: Providers,
    /// Where the web is searched, where the operator says so.
    pub search: Option<Search>,
    /// Where programs are run, where the operator allows any.
    pub sandbox: Option<Sandbox>,
    /// Whose tools agents may use besides.
    pub mcp: McpServers,
}

/// The rule by which the company's policy, or the role under which it is used, forbids a tool with
/// its arguments; nothing where none does.
fn forbidden(policy: &Policy, agent: Option<&AgentRow>, tool: &str, params: &Map<String, Value>) -> Option<String> {
    let host = params.get("url").and_then(Value::as_str).map(|url| egress::host_of(url).unwrap_or_default());
    let of_policy = policy
        .forbids(&Action::of_tool(tool))
        .or_else(|| policy.forbids_host(host.as_deref().unwrap_or_default()).filter(|_| host.is_some()));
    let config = agent.map(|agent| &agent.config);
    let list = |name: &str| config.and_then(|config| config.get(name)?.as_array());
    let unnamed = || {
        let named = tools::registry::offered(list("tools"), true);
        tools::registry::find(&named, tool).is_none().then(|| "the agent's config.tools".to_owned())
    };
    let unlisted = || {
        let hosts: Vec<String> =
            list("allowed_hosts")?.iter().filter_map(|host| Some(host.as_str()?.to_owned())).collect();
        let listed = Policy::lists(&hosts, host.as_deref()?);
        (!listed).then(|| "the agent's config.allowed_hosts".to_owned())
    };
    of_policy.or_else(unnamed).or_else(unlisted)
}

/// One step to be done.
#[derive(Debug)]
pub struct StepCall<'a> {
    /// Whose.
    pub company: CompanyId,
    /// Of which run.
    pub run: RunId,
    /// By which playbook.
    pub playbook: &'a Playbook,
    /// The step.
    pub step: &'a Step,
    /// Its parameters, every reference looked up.
    pub params: Map<String, Value>,
    /// What its parameters may hold, to be taken out of answers before they are cut.
    pub secrets: Option<&'a Arc<Secrets>>,
    /// Where what is large is kept.
    pub artifacts: &'a Artifacts<'a>,
    /// By which it works inside the company.
    pub deeds: &'a Deeds,
    /// The agent of its role.
    pub agent: Option<&'a AgentRow>,
    /// What its last draft came to, where another one is made.
    pub feedback: Option<&'a Value>,
    /// The same over every try of this step.
    pub idempotency_key: String,
    /// How long is left.
    pub timeout: Duration,
    /// How long nothing may come of it.
    pub idle: Duration,
    /// When the attempt began.
    pub began: Instant,
}

impl<'a> StepCall<'a> {
    /// As a call of a tool.
    fn of_tool(self) -> ToolCall<'a> {
        ToolCall {
            company: self.company,
            run: self.run,
            params: self.params,
            secrets: self.secrets,
            artifacts: self.artifacts,
            deeds: self.deeds,
            idempotency_key: self.idempotency_key,
            timeout: self.timeout,
            idle: self.idle,
        }
    }
}

impl Hands {
    /// Hands that keep files under a directory.
    pub fn new(egress: Egress, workspaces: impl Into<PathBuf>, providers: Providers) -> Self {
        Self {
            egress,
            workspaces: Workspaces::new(workspaces.into()),
            providers,
            search: None,
            sandbox: None,
            mcp: McpServers::default(),
        }
    }

    /// The same with a search of the web.
    #[must_use]
    pub fn searching(mut self, search: Option<Search>) -> Self {
        self.search = search;
        self
    }

    /// The same with a place to run programs in.
    #[must_use]
    pub fn running(mut self, sandbox: Option<Sandbox>) -> Self {
        self.sandbox = sandbox;
        self
    }

    /// The same with the tools of servers.
    #[must_use]
    pub fn with_mcp(mut self, servers: McpServers) -> Self {
        self.mcp = servers;
        self
    }

    /// Does a step.
    pub async fn step(
        &self,
        job: &ClaimedJob,
        work: &StepWork,
        artifacts: &Artifacts<'_>,
        journals: &Journals<'_>,
    ) -> Outcome {
        if let Some(why) = &work.context.playbook.unreadable {
            return Outcome::failed(Failure::invalid(why.clone()));
        }
        let index = usize::try_from(job.step).unwrap_or(usize::MAX);
        // Between its steps there is nothing to do but to decide.
        if job.step == JUNCTION || job.kind == kind::BEGIN || work.context.is_past_all(index) {
            return Outcome::done(Value::Null);
        }
        let Some(step) = work.context.playbook.step(index) else {
            return Outcome::failed(Failure::invalid(format!("the playbook has no step {index}")));
        };
        if let Some(refused) = &work.context.refused {
            return Outcome::failed(refused.failure());
        }
        // What gave no value when the run came here gives its reason now.
        let asked = work.context.holds(step).and_then(|_| match &step.kind {
            StepKind::Sleep(pause) => work.context.pause(pause).map(drop),
            _ => Ok(()),
        });
        match (asked, &step.kind) {
            (Err(failure), _) => return Outcome::failed(failure),
            (Ok(()), StepKind::Sleep(_) | StepKind::Goto { .. }) => return Outcome::done(Value::Null),
            (Ok(()), StepKind::WaitFor(wait)) => return work.context.wait(index, wait),
            (Ok(()), StepKind::Work | StepKind::Playbook(_)) => {}
        }
        match (&step.fan, &work.context.item) {
            (Some(fan), None) => {
                let outcome = work.context.fan(fan);
                return match (&outcome, work.context.outputs_apart()) {
                    (Outcome::Done { .. }, Some(apart)) => artifacts.list(job.step, work.context.round(), apart).await,
                    _ => outcome,
                };
            }
            (Some(fan), Some(item)) if item.list.is_empty() => {
                let why = work.context.list(fan).err();
                return Outcome::failed(why.unwrap_or_else(|| Failure::invalid("for_each: the list has changed")));
            }
            _ => {}
        }
        if let StepKind::Playbook(playbook) = &step.kind {
            let none = || Outcome::failed(Failure::invalid("no run does the step"));
            return work.context.called(playbook).unwrap_or_else(none);
        }
        if work.context.to_settle().is_some() {
            return Outcome::done(Value::Null);
        }
        let secrets = match &work.secrets {
            Some(Err(failure)) if work.context.playbook.gives_secrets(step) => return Outcome::failed(failure.clone()),
            Some(Ok(secrets)) => Some(secrets),
            _ => None,
        };
        let params = match secrets {
            Some(secrets) => work.context.params_with(step, secrets.values()),
            None => work.context.params(step),
        };
        let params = match params {
            Ok(params) => params,
            Err(failure) => return Outcome::failed(failure),
        };
        let own_key = digest::idempotency_key(
            work.context.run,
            &step.id,
            work.context.round(),
            work.context.item.as_ref().map(|item| item.index),
        );
        let agent = work.agent(index);
        let deeds = journals.deeds(agent.map(|agent| agent.agent), beats::task_of(&work.context.inputs));
        let call = StepCall {
            company: job.company,
            run: work.context.run,
            playbook: &work.context.playbook,
            step,
            params,
            secrets,
            artifacts,
            deeds: &deeds,
            agent,
            feedback: work.context.feedback(),
            idempotency_key: digest::draft_key(
                own_key,
                work.context.drafts_before(),
                work.context.to_grade().is_some(),
            ),
            // The company's limit ends it by itself, and says so.
            timeout: job.timeout,
            idle: step.idle,
            began: Instant::now(),
        };
        if let Some(draft) = work.context.to_grade() {
            return self.grade(call, draft, work.judge(index), journals).await;
        }
        // The one step without effects needs nothing of what follows.
        if step.action == tools::TRANSFORM {
            return Outcome::done(Value::Object(call.params));
        }
        if TOOLS.contains(&step.action.as_str()) {
            let action = step.action.as_str();
            if let Some(rule) = forbidden(&work.context.policy, agent, action, &call.params) {
                let noted = journals.denied(action, &rule).await;
                let refused = format!("{rule} forbids this call of {action}");
                return Outcome::failed(noted.err().unwrap_or_else(|| Failure::new(ErrorClass::Governance, refused)));
            }
            // Who was stopped does nothing, with a model or without: its job waits for it.
            if let Some(agent) = agent.filter(|agent| agent.killed) {
                let journal = journals.of(&call.idempotency_key, agent.agent, "tool");
                return match journal.hold().await {
                    Ok(()) => Outcome::Released { delay: Duration::ZERO },
                    Err(failure) => Outcome::failed(failure),
                };
            }
            return tools::run(self, action, call.of_tool()).await;
        }
        agent::work(self, call, journals, "inference").await
    }

    /// Asks whoever grades what a draft of a step is worth.
    async fn grade(
        &self,
        call: StepCall<'_>,
        draft: &Draft,
        judge: Option<&AgentRow>,
        journals: &Journals<'_>,
    ) -> Outcome {
        let Some(rubric) = &call.step.rubric else { return Outcome::failed(Failure::invalid("nothing is graded")) };
        let params = json!({
            "step": call.step.id, "action": call.step.action, "params": call.params,
            "criteria": rubric.question(), "output": draft.output,
        });
        let Value::Object(params) = params else { return Outcome::failed(Failure::invalid("nothing is graded")) };
        // Another agent has its own adapter and model.
        let own = rubric.judge.is_none();
        let step = Step {
            role: rubric.judge.clone().or_else(|| call.step.role.clone()),
            action: GRADE.to_owned(),
            adapter: call.step.adapter.clone().filter(|_| own),
            model: call.step.model.clone().filter(|_| own),
            ..call.step.clone()
        };
        let call = StepCall { step: &step, params, agent: judge, feedback: None, ..call };
        agent::work(self, call, journals, "rubric").await
    }

    /// Why an agent cannot work here, or nothing.
    pub fn cannot_work(&self, agent: &AgentRow) -> Option<String> {
        self.providers.cannot_work(agent)
    }
}
