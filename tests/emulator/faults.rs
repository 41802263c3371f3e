//! Planted faults: `faults.txt` lists them. A build with EMULATOR_FAULTS has all of them, and the environment variable EMULATOR_FAULT
//! chooses one at run time by its number, counted from 1. `.ci/gpu-faults` checks that tests notice each.

use std::ops::Range;

/// A fault: the text that it replaces, between the context before and after, and what replaces it.
#[derive(Default)]
struct Fault {
    number: usize,
    file: String,
    name: String,
    before: Vec<String>,
    original: Vec<String>,
    after: Vec<String>,
    faulty: Vec<String>,
}

/// The faults in a list. `faults.txt` describes the format.
fn parse(list: &str) -> Vec<Fault> {
    let mut faults: Vec<Fault> = Vec::new();
    let mut file = String::new();
    for line in list.lines() {
        if let Some(name) = line.strip_prefix("== ") {
            file = name.to_string();
        } else if let Some(name) = line.strip_prefix("# ") {
            let (number, name) = (faults.len() + 1, name.to_string());
            faults.push(Fault { number, name, file: file.clone(), ..Fault::default() });
        } else if let Some(fault) = faults.last_mut() {
            let is_before = fault.original.is_empty();
            match line.split_at_checked(2) {
                Some(("- ", text)) => fault.original.push(text.to_string()),
                Some(("+ ", text)) => fault.faulty.push(text.to_string()),
                Some(("  ", text)) if is_before => fault.before.push(text.to_string()),
                Some(("  ", text)) => fault.after.push(text.to_string()),
                // The rest are explanations, empty lines and the description of the format.
                _ => {}
            }
        }
    }
    faults
}

impl Fault {
    /// Where the original is in a text. It is an error if the original and its context do not occur exactly once.
    fn find(&self, text: &str) -> Result<Range<usize>, String> {
        let lines = [&self.before[..], &self.original, &self.after].concat().join("\n");
        let mut places = text.match_indices(&lines);
        let (Some((start, _)), None) = (places.next(), places.next()) else {
            let count = text.matches(&lines).count();
            return Err(format!(
                "fault {}, \"{}\": its original text occurs {count} times in {}, expected once:\n{lines}",
                self.number, self.name, self.file
            ));
        };
        let start = start + self.before.iter().map(|line| line.len() + 1).sum::<usize>();
        Ok(start..start + self.original.join("\n").len())
    }

    /// The choice between the fault and the original: between values in an expression and in a declaration, else between statements.
    fn choice(&self, original: &str) -> String {
        let (number, faulty) = (self.number, self.faulty.join(" "));
        let is_statement = self.original.join("\n").ends_with(';');
        if is_statement
            && let Some((declared, value)) = declaration(original)
            && let Some((_, other)) = declaration(&faulty)
        {
            return format!("{declared} = (FAULT({number}) ? ({other}) : ({value}));");
        }
        if is_statement {
            format!("if (FAULT({number})) {{ {faulty} }} else {{ {original} }}")
        } else {
            format!("(FAULT({number}) ? ({faulty}) : ({original}))")
        }
    }
}

/// The type and the name of a declaration, and its value.
fn declaration(statement: &str) -> Option<(&str, &str)> {
    let (declared, value) = statement.strip_suffix(';')?.split_once(" = ")?;
    let is_word = |word: &str| word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    let (declared_type, name) = declared.split_once(' ')?;
    (is_word(declared_type) && is_word(name)).then_some((declared, value))
}

/// The text of a file in which each original is replaced by a choice. The lines keep their numbers.
pub fn with_choices(list: &str, file: &str, text: &str) -> Result<String, String> {
    let faults = parse(list);
    let of_file = faults.iter().filter(|fault| fault.file == file);
    let mut found =
        of_file.map(|fault| Ok((fault.find(text)?, fault))).collect::<Result<Vec<_>, String>>()?;
    // What surrounds another original comes before it.
    found.sort_by_key(|(place, fault)| (place.start, std::cmp::Reverse(place.end), fault.number));
    replaced(text, 0..text.len(), &found)
}

/// A part of the text in which the originals are replaced.
fn replaced(
    text: &str,
    part: Range<usize>,
    found: &[(Range<usize>, &Fault)],
) -> Result<String, String> {
    let (mut out, mut at, mut rest) = (String::new(), part.start, found);
    while let [(place, fault), others @ ..] = rest {
        let (inner, others) =
            others.split_at(others.iter().take_while(|(other, _)| other.start < place.end).count());
        if let Some((_, other)) = inner.iter().find(|(other, _)| other.end > place.end) {
            return Err(format!(
                "the originals of \"{}\" and \"{}\" overlap",
                fault.name, other.name
            ));
        }
        out += &text[at..place.start];
        out += &fault.choice(&replaced(text, place.clone(), inner)?);
        (at, rest) = (place.end, others);
    }
    Ok(out + &text[at..part.end])
}

/// The list fits the kernels. Each original occurs once.
#[test]
fn every_fault_fits_the_kernels() -> Result<(), String> {
    let list = include_str!("faults.txt");
    let sources = [
        ("kernels.inc", include_str!("../../src/gpu/kernels.inc")),
        ("cuda.cu", include_str!("../../src/gpu/cuda.cu")),
        ("metal.metal", include_str!("../../src/gpu/metal.metal")),
    ];
    for (file, text) in sources {
        let faulty = with_choices(list, file, text)?;
        assert_eq!(faulty.lines().count(), text.lines().count(), "{file}");
        let count = parse(list).iter().filter(|fault| fault.file == file).count();
        assert!(count > 0, "no fault in {file}");
        assert_eq!(faulty.matches("FAULT(").count(), count, "{file}");
    }
    Ok(())
}
