"""Function words of languages: articles, pronouns, prepositions, conjunctions, auxiliary and
modal verbs, particles.

All other words have content. Languages without a list have no scores of content words.
"""

_GERMAN = (
    "ab aber alle allem allen aller alles als also am an auch auf aus bei beim bin bis "
    "bist da dabei dadurch dafür dagegen daher damit dann daran darauf daraus darin das "
    "dass davon dazu dein deine deinem deinen deiner dem den denen denn der deren des "
    "dessen dich die dies diese diesem diesen dieser dieses dir doch dort du durch eben "
    "ein eine einem einen einer eines er es etwa etwas euch euer eure für gegen gehabt "
    "gewesen geworden hab habe haben hat hatte hatten hätte hier hin hinter ich ihm ihn "
    "ihnen ihr ihre ihrem ihren ihrer im in ins ist ja jede jedem jeden jeder jedes jene "
    "jetzt kann kein keine keinem keinen keiner können könnte man mein meine meinem "
    "meinen meiner mich mir mit muss müssen nach neben nicht noch nun nur ob oder ohne "
    "schon sehr sei sein seine seinem seinen seiner seit sich sie sind so sogar soll "
    "sollen sollte sondern sowie über um und uns unser unsere unter vom von vor wann war "
    "waren warum was weil welche welcher wenn wer werde werden wie wieder will wir wird "
    "wirst wo wobei wollen worden wurde wurden würde während zu zum zur zwar zwischen"
)
_ENGLISH = (
    "a about above after again against all am an and any are as at be because been "
    "before being below between both but by can could did do does doing don't down "
    "during each few for from further had has have having he her here hers herself him "
    "himself his how i if in into is isn't it it's its itself i'm just me more most my "
    "myself no nor not of off on once only or other our ours ourselves out over own "
    "same shall she should so some such than that that's the their theirs them "
    "themselves then there these they they're this those through to too under until up "
    "upon us very was we we're were what when where which while who whom why will with "
    "would you you're your yours yourself yourselves"
)
# Maps the tag of a language to its function words, in lower case.
FUNCTION_WORDS = {"de": frozenset(_GERMAN.split()), "en": frozenset(_ENGLISH.split())}
